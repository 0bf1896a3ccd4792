"""Training whose every step is one CUDA graph: crops are cut on the GPU, and nothing is launched one by one.

A small model's step is a great many kernels, each so short that a GPU waits for Python most of the time. Recorded once
and replayed, they follow each other without a gap. What is trained, and on which loss, is what
:func:`fmpq_fx.training.loop.train` trains; but the crops are others, and a run cannot be resumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import MaskedConv2d
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode

from fmpq_fx.history import History, Settings
from fmpq_fx.images.crops import cut, describe
from fmpq_fx.images.reading import Source
from fmpq_fx.progress import reported
from fmpq_fx.rd import MSE, rate_and_distortion
from fmpq_fx.training.data import large_enough
from fmpq_fx.training.run import TrainingRun, parameter_groups

WARM_UP = 3  # steps before the recording, in which libraries choose their kernels


class CropsOnDevice:
    """Random crops of photographs that all lie in the memory of a device, as bytes.

    Args:
        images: the photographs; those smaller than two crops are left out.
        size: side of a crop in pixels.
        count: crops in a batch; half of them have twice the side, and are halved.
        device: where to keep the photographs, and to cut.
    """

    def __init__(self, images: Sequence[Source], size: int, count: int, device: torch.device):
        self.size, self.count = size, count
        with ThreadPoolExecutor() as pool:
            usable = list(pool.map(lambda image: image.load(), large_enough(images, 2 * size)))
        self.sides = torch.tensor([image.shape[1:] for image in usable], device=device)
        largest = [max(image.shape[k] for image in usable) for k in (1, 2)]
        self.photographs = torch.zeros(len(usable), 3, *largest, dtype=torch.uint8, device=device)
        for place, image in zip(self.photographs, usable, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = (255 * image).round().to(device)

    def draw(self) -> Tensor:
        """Return other crops at every call, (count, 3, size, size), float32 in [0, 1]."""
        half = self.count // 2
        whole = nn.functional.avg_pool2d(self._cut(half, 2 * self.size), 2)
        return torch.cat([self._cut(self.count - half, self.size), whole])

    def _cut(self, count: int, size: int) -> Tensor:
        device = self.photographs.device
        which = torch.randint(len(self.photographs), (count,), device=device)
        room = self.sides[which] - size + 1
        top, left = (torch.rand(count, 2, device=device) * room).long().unbind(1)
        along = torch.arange(size, device=device).expand(count, size)
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = left[:, None] + torch.where(mirrored, size - 1 - along, along)
        rows = top[:, None] + along
        # An index per axis that stands apart from the channels' gives (count, rows, columns, channels).
        crops = self.photographs[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2).contiguous() / 255


@contextmanager
def masks_kept_by_gradients(model: nn.Module) -> Iterator[None]:
    """Make masked convolutions plain ones, whose gradients are masked.

    CompressAI's give their weight other memory in each forward, which a graph's replay would not follow.
    """
    masked = {name: m for name, m in model.named_modules() if isinstance(m, MaskedConv2d)}
    handles = []
    for name, module in masked.items():
        plain = nn.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding
        )
        module.weight.data = module.weight.data * module.mask
        plain.weight, plain.bias = module.weight, module.bias
        handles.append(module.weight.register_hook(lambda gradient, mask=module.mask: gradient * mask))
        model.set_submodule(name, plain)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in masked.items():
            model.set_submodule(name, module)


class AxesOnCPU(TorchFunctionMode):
    """Leaves lists of axes on the CPU.

    CompressAI's entropy bottleneck makes one on the GPU in each forward and reads it back, which cannot be recorded.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``; a tensor of integers that are given as numbers goes to the CPU."""
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.arange) and given.get("dtype") == torch.long:
            given["device"] = "cpu"
        return func(*args, **given)


class Steps:
    """Steps of training ``model``; the first call records what the later ones replay."""

    def __init__(self, model: nn.Module, settings: Settings, crops: CropsOnDevice):
        self.model, self.settings, self.crops = model, settings, crops
        device = crops.photographs.device
        capturable = device.type == "cuda"
        self.rate = torch.tensor(settings.lr, device=device)
        self.parameters = [p for group in parameter_groups(model, settings) for p in group["params"]]
        self.bottlenecks = [m for m in model.modules() if isinstance(m, EntropyBottleneck)]
        self.optimizer = torch.optim.Adam(self.parameters, self.rate, capturable=capturable)
        quantiles = [m.quantiles for m in self.bottlenecks]
        self.aux_optimizer = torch.optim.Adam(quantiles, settings.aux_lr, capturable=capturable)
        self.loss = torch.zeros((), device=device)
        self.replay: Callable[[], None] | None = None

    def __call__(self, number: int) -> Tensor:
        """Do step ``number``, and return its loss, which the next step overwrites."""
        self.rate.fill_(self.settings.lr * self.settings.schedule(number))
        if self.replay is not None:
            self.replay()
        elif number < WARM_UP or self.loss.device.type != "cuda":
            self._step()
        else:
            self.optimizer.zero_grad()
            self.aux_optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.replay = graph.replay
            self.replay()
        return self.loss

    def _step(self) -> None:
        self.optimizer.zero_grad()
        x = self.crops.draw()
        with AxesOnCPU():
            output = self.model(x)
        rate, distortion = rate_and_distortion(output, x, self.settings.lmbda, MSE)
        (rate + distortion).backward()
        clip_grad_norm_(self.parameters, self.settings.max_norm, foreach=True)
        self.optimizer.step()
        self.aux_optimizer.zero_grad()
        torch.stack([m.loss() for m in self.bottlenecks]).sum().backward()
        self.aux_optimizer.step()
        self.loss.copy_((rate + distortion).detach())


def train(
    model: nn.Module, images: Sequence[Source], settings: Settings, validation: Sequence[Source]
) -> History:
    """Train ``model`` in place, and leave it in the state of the best validation, in evaluation mode.

    Args:
        model: a model on a GPU, whose forward returns CompressAI's dict and branches on no values.
        images: the photographs to train on.
        settings: the options of training; its distortion is MSE.
        validation: photographs to validate on, by one crop of 256 x 256 from the centre of each.
    """
    device = next(model.parameters()).device
    torch.manual_seed(settings.seed)
    crops = CropsOnDevice(images, settings.crop, settings.batch_size, device)
    batches = cut(list(validation), count=len(validation))
    if device.type == "cuda":  # on a CPU, torch 2.14 crashes in PixelShuffle's backward in this layout
        model.to(memory_format=torch.channels_last)
    with masks_kept_by_gradients(model):
        run = TrainingRun(model, [x.to(device) for x in batches], settings)
        run.validate()
        step, losses = Steps(model, settings, crops), torch.empty(settings.validate_every, device=device)
        side = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(side), reported(range(settings.steps), "training", "step") as numbers:
            for number in numbers:
                if number % settings.validate_every == 0:
                    model.train()
                losses[number % settings.validate_every] = step(number)
                if (number + 1) % settings.validate_every == 0 or number + 1 == settings.steps:
                    run.losses += losses[: number % settings.validate_every + 1].tolist()
                    run.validate()
                    last = run.validation[-1]
                    text = f"{last.rd_loss:.4g} ({last.bpp:.3f} bpp, {last.psnr:.2f} dB)"
                    numbers.set_postfix({"validation": text}, refresh=False)
        model.load_state_dict(run.best)
    model.zero_grad()
    model.eval().to(memory_format=torch.contiguous_format)
    return History(
        settings,
        f"{len(crops.photographs)} images",
        describe(batches),
        tuple(run.losses),
        tuple(run.validation),
        run.remarks,
    )
