"""Threads that use one codec at the same time get what each would get alone."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import fx, nn

import fmpq_fx
from support.small_models import images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("robust", ["exact", "guarded"])
def test_two_threads_make_the_same_files_and_images(
    robust: str, dtype: torch.dtype, prepared: fx.GraphModule
) -> None:
    codec: nn.Module = fmpq_fx.convert(prepared, exact=robust == "exact").to(dtype)
    x = images()
    photos = [x[index % 2].roll(index, -1) for index in range(4)]
    set_to = torch.get_default_dtype(), torch.backends.mkldnn.enabled
    files = [fmpq_fx.encode(codec, photo) for photo in photos]
    decoded = [fmpq_fx.decode(codec, file) for file in files]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(partial(fmpq_fx.encode, codec), photos)) == files
        for ours, alone in zip(threads.map(partial(fmpq_fx.decode, codec), files), decoded, strict=True):
            assert torch.equal(ours, alone)
    assert (torch.get_default_dtype(), torch.backends.mkldnn.enabled) == set_to
