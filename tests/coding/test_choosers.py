"""What guards hold, and what choosers make of any of it."""

import torch
from compressai.entropy_models import GaussianConditional
from hypothesis import given, settings
from hypothesis import strategies as st

from fmpq_fx import FmpqError
from fmpq_fx.coding.choosers import GuardReader, GuardWriter
from fmpq_fx.coding.guard import LEAST_MARGIN, MOST_MARGIN, Guard


def test_a_forged_margin_takes_no_memory() -> None:
    reader = GuardReader(Guard(1e-40, (3,), 0))
    reader.indexes(GaussianConditional([0.11, 0.5, 64.0]), torch.full((100,), 0.3))
    assert reader.guard.block <= 2**16


@given(
    st.lists(st.integers(0, 999), max_size=300),
    st.sampled_from([2**-20, LEAST_MARGIN, MOST_MARGIN]),
    st.integers(0, 2**32 - 1),
)
def test_a_guard_comes_back_from_its_bytes(shifts: list[int], margin: float, checksum: int) -> None:
    guard = Guard(margin, tuple(shifts), checksum)
    assert Guard.from_bytes(guard.to_bytes(), 300) == guard


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_other_bytes_are_a_guard_or_an_error(data: bytes) -> None:
    try:
        guard = Guard.from_bytes(data, 1000)
    except FmpqError:
        return
    assert len(guard.shifts) <= 1000


def test_shifts_of_scales_move_none_of_them_far() -> None:
    """Scales right at boundaries, as clamped ones are: a shift takes them off."""
    prior = GaussianConditional([0.11, 0.2, 0.5, 2.0, 64.0])
    scales = torch.tensor([[0.11, 0.5, 2.0, -3.0, 0.0, 100.0]]).repeat(700, 1)
    writer = GuardWriter(2**-10, frozenset())
    writer.indexes(prior, scales)
    assert set(writer.shifts) == {1}


def test_a_table_without_order_is_searched_as_compressai_does() -> None:
    prior = GaussianConditional(None)
    prior.update_scale_table([8.0, 0.5, 2.0, 64.0])
    scales = torch.tensor([[0.1, 1.0, 5.0, 30.0, 99.0]])
    writer = GuardWriter(2**-10, frozenset())
    assert torch.equal(writer.indexes(prior, scales), prior.build_indexes(scales))
