"""The codec is a model of the user's class: copied, compiled and changed like one, with nothing replaced on objects."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compressai.models import FactorizedPriorReLU, MeanScaleHyperprior, ScaleHyperprior
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import decode, encode
from fmpq_fx.coding.codec import codec_of
from support.coded_models import CODED, codec, graph_of, lively
from support.trained_graphs import Own, trained


def picture(seed: int = 0) -> Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))


def saved(codec: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(codec, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "shallow": copy.copy,
    "deep": copy.deepcopy,
    "pickled": lambda codec: pickle.loads(pickle.dumps(codec)),
    "saved": saved,
}


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
def test_it_is_a_model_of_the_users_class(name: str) -> None:
    exact, cls = codec(name), type(CODED[name]())
    assert isinstance(exact, cls)
    assert (type(exact).__name__, type(exact).__module__) == (cls.__name__, cls.__module__)
    assert dict(exact.named_modules())["g_a"] is exact.g_a
    assert all(not key.startswith(("model.", "fmpq")) for key in exact.state_dict())


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_code_the_same(make: Callable[[Any], Any]) -> None:
    exact = codec("mbt2018")
    twin = make(exact)
    assert type(twin) is type(exact)
    data = encode(exact, picture())
    assert encode(twin, picture()) == data
    assert torch.equal(decode(twin, data), decode(exact, data))


def test_a_deep_copy_has_weights_of_its_own() -> None:
    exact = codec("scale hyperprior")
    data = encode(exact, picture())
    twin = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert encode(exact, picture()) == data


def test_a_compiled_codec_codes_as_well() -> None:
    model = FactorizedPriorReLU(4, 4).eval()  # of few layers, since each takes a second to compile
    model.update()
    plain = codec_of(model)
    compiled: Any = torch.compile(plain, backend="eager")
    data = encode(plain, picture())
    assert encode(compiled, picture()) == data
    assert torch.equal(decode(compiled, data), decode(plain, data))
    with torch.no_grad():
        torch.testing.assert_close(compiled(picture()[None])["x_hat"], plain(picture()[None])["x_hat"])


def test_threads_share_a_codec() -> None:
    exact = codec("scale hyperprior")
    images = [picture(seed) for seed in range(4)]
    expected = [encode(exact, image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda image: encode(exact, image), images)) == expected


def test_coding_replaces_nothing_on_objects() -> None:
    for name in ("scale hyperprior", "mbt2018"):
        exact = codec(name)
        before = [dict(vars(module)) for module in exact.modules()]
        decode(exact, encode(exact, picture(), memory="5MB"), memory="5MB")
        assert [vars(module).keys() for module in exact.modules()] == [
            attributes.keys() for attributes in before
        ]
        assert not any(set(attributes) & {"forward", "compress", "_compress_ar"} for attributes in before)


class Marked(MeanScaleHyperprior):
    """A user's class that does more when it codes."""

    def compress(self, x: Tensor) -> dict[str, Any]:
        return {**super().compress(x), "mark": len(self.state_dict())}


def test_the_users_own_methods_run() -> None:
    torch.manual_seed(0)
    exact: Any = fmpq_fx.convert(
        graph_of(Marked(8, 12).eval(), lively("scale hyperprior")[1][:, :, :64, :64], None)
    )
    with torch.no_grad():
        coded = exact.compress(picture()[None])
    assert coded["mark"] == len(exact.state_dict())
    exact.g_s = nn.Sequential(exact.g_s, nn.Hardtanh(0.25, 0.5))
    values = decode(exact, encode(exact, picture()))
    assert values.min() >= 0.25
    assert values.max() <= 0.5


def test_a_class_that_cannot_code_is_returned_as_it_is() -> None:
    assert type(fmpq_fx.convert(trained(Own().eval()))) is Own


def test_any_model_that_codes_is_guarded_while_it_does() -> None:
    model = ScaleHyperprior(8, 12).eval()
    model.update()
    coder = model.entropy_bottleneck.entropy_coder
    with pytest.raises(fmpq_fx.FmpqError, match="steps away from its mean"):
        codec_of(model).compress(torch.full((1, 3, 64, 64), float("nan")))
    assert model.entropy_bottleneck.entropy_coder is coder
