"""Groups of sites."""

import pytest

from fmpq_fx.passes.measure.groups import MOST, halves, in_groups, subgroups


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 65, 448])
def test_groups_hold_every_site_once_in_order(count: int) -> None:
    sites = [f"s{number}" for number in range(count)]
    groups = in_groups(sites)
    assert [site for group in groups for site in group] == sites
    assert len(groups) <= MOST
    assert count > MOST or all(len(group) == 1 for group in groups)
    assert all(groups)


def test_subgroups_are_the_group_and_its_halves_down_to_single_sites() -> None:
    assert halves(("a", "b", "c")) == (("a",), ("b", "c"))
    assert list(subgroups(("a", "b", "c"))) == [("a", "b", "c"), ("a",), ("b", "c"), ("b",), ("c",)]
