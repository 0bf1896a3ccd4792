"""The processes that share a job, its ranks, and the messages between them.

Within :func:`joined`, ``prepare``, ``analyze`` and ``finetune`` divide their work among the ranks; every rank must make
the same calls. They ask for :func:`current` once and pass it on to all code that talks to the other ranks. Outside of
such a block a process is :data:`ALONE`, and receives only its own messages.
"""

import atexit
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmpq_fx.errors import FmpqError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that runs but does not answer; a rank that has ended is noticed at once."""

_sharing = False
_own_group = False  # whether the process group was made here


@contextmanager
def joined(device: str | torch.device = "cpu", *, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Within the block, share the work with the other processes of the job.

    These are the processes that torchrun started, or those of an existing process group. With neither, this process
    stays alone. Only rank 0 shows warnings, since all ranks would show the same. All ranks leave the block together,
    when the files that rank 0 writes in it are written.

    Example, for ``torchrun --nproc-per-node 2 script.py``::

        with ranks.joined("cuda") as device:
            gm = fmpq_fx.prepare(model.to(device), 0.25)
            fmpq_fx.finetune(gm, "photos/")
            if ranks.is_first():
                fmpq_fx.save(gm, "model.fmpq")

    Args:
        device: the device that this process computes on; "cuda" gives each process on the machine its own GPU.
        timeout: how long to wait for a rank that does not answer; an existing process group keeps its own timeout.

    Yields:
        the device of this process.

    Raises:
        ValueError: torch knows no such device.
        FmpqError: the device is not there, or there are fewer GPUs than processes.
    """
    global _sharing, _own_group
    own = own_device(device)
    if _sharing or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield own
        return
    if own.type == "cuda":
        if own.index is None:  # other launchers than torchrun may have chosen it already
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device()))
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        # The group stays for later blocks, since torchrun's processes cannot make a second one.
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=timeout)
        _own_group = True
    _sharing = True
    atexit.unregister(_leave)  # until the block has succeeded: it could wait for ranks that have failed
    try:
        with warnings.catch_warnings():
            if not is_first():
                warnings.simplefilter("ignore")
            yield own
        current().gather(None)
        if _own_group:
            atexit.register(_leave)
    finally:
        _sharing = False


def _leave() -> None:
    """Take the process group apart. Its threads, left over when Python ends, may abort a process that has succeeded."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(device: str | torch.device) -> torch.device:
    """Return ``device``; "cuda" under torchrun is the GPU of this process.

    Raises:
        ValueError: torch knows no such device.
        FmpqError: the device is not there, or there are fewer GPUs than processes.
    """
    try:
        own = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}; pass cpu, cuda or cuda:1, say ({error})") from error
    if own.type != "cuda":
        return own
    if not torch.cuda.is_available():
        raise FmpqError(
            f"the device {own} is not there: torch {torch.__version__} finds no GPU; pass cpu, or install the "
            "torch that is built for this machine's GPU and driver"
        )
    if own.index is None and dist.is_torchelastic_launched():
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    found = torch.cuda.device_count()
    if (own.index or 0) >= found:
        raise FmpqError(
            f"the device {own} is not there: this machine has {found} GPU{'s' * (found != 1)}; start at most one "
            "process for each (torchrun --nproc-per-node)"
        )
    return own


def started() -> int:
    """Return how many processes torchrun started, joined or not; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def who() -> str:
    """Return the prefix of this process's messages, "rank 1 of 4: "; "" if torchrun started no other process."""
    return f"rank {os.environ['RANK']} of {started()}: " if started() > 1 else ""


def current() -> "Ranks":
    """Return the ranks that share the work now."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if _sharing else ALONE


def is_first() -> bool:
    """Return whether this is the process that prints and writes."""
    return current().is_first


@dataclass(frozen=True)
class Ranks:
    """The processes that share a job, seen by one of them.

    All methods but :meth:`share` talk to the other ranks. Every rank must call them, in the same order; otherwise the
    ranks that do wait for those that do not.
    """

    rank: int = 0  # the number of this process, from 0
    count: int = 1  # how many there are

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of ``items``. Neighbours, which often cost alike, go to different ranks."""
        return items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every rank, in their order."""
        if self.count == 1:
            return [value]
        values = [value] * self.count
        with _in_touch():
            dist.all_gather_object(values, value)
        return values

    def take_first(self, value: T) -> T:
        """Return the ``value`` of rank 0. Its last bits may differ between ranks on different machines."""
        return self.gather(value)[0]

    def merge(self, results: Sequence[T]) -> list[T]:
        """Return the ``results`` of all ranks, each for its :meth:`share`, in the order of the items."""
        shares = self.gather(results)
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def average(self, x: Tensor) -> Tensor:
        """Return the mean of ``x``, of equal shape on every rank; in place."""
        if self.count > 1:
            with _in_touch():
                dist.all_reduce(x)
            x /= self.count
        return x

    def replicate(self, module: nn.Module) -> nn.Module:
        """Return ``module``, with gradients that are the means over all ranks; it need not use all its parameters."""
        return DistributedDataParallel(module, find_unused_parameters=True) if self.count > 1 else module

    def require_same(self, about: Mapping[str, str]) -> None:
        """Check that all ranks were given the same things.

        Args:
            about: a text about each thing that was given, by its name.

        Raises:
            FmpqError: the texts differ; the message names the first that does.
        """
        first, *others = self.gather(dict(about))
        for number, other in enumerate(others, start=1):
            for name, text in first.items():
                if other.get(name) != text:
                    raise FmpqError(
                        f"the ranks were given different things: {name} is {text!r} for rank 0 and "
                        f"{other.get(name)!r} for rank {number}; start all of them with the same options, files and "
                        "weights"
                    )


ALONE = Ranks()
"""The ranks of a process that shares its work with no other process."""


@contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FmpqError(
            f"the other ranks cannot be reached any more: one of them failed, was ended, or does not answer ({error})"
        ) from error
