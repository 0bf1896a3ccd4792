"""Groups of sites that are changed together, so that models of hundreds of sites take few runs."""

import math
from collections.abc import Iterator, Sequence

Group = tuple[str, ...]
"""Sites that are changed together; mostly there is one."""

MOST = 32
"""The largest number of groups at first. So many sites, or fewer, stand alone."""


def in_groups(sites: Sequence[str]) -> list[Group]:
    """Return ``sites`` in at most :data:`MOST` groups of neighbours."""
    size = max(1, math.ceil(len(sites) / MOST))
    return [tuple(sites[i : i + size]) for i in range(0, len(sites), size)]


def halves(group: Group) -> tuple[Group, Group]:
    """Return the two halves of ``group``, of two sites or more."""
    return group[: len(group) // 2], group[len(group) // 2 :]


def subgroups(group: Group) -> Iterator[Group]:
    """Yield ``group`` and all subgroups that halving leads to, down to single sites."""
    yield group
    if len(group) > 1:
        for half in halves(group):
            yield from subgroups(half)
