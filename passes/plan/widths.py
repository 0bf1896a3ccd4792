"""Read the bits that users ask for: for all sites, by name, by glob."""

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral

from fmpq_fx.passes.plan.tables import Site

WIDTHS = range(2, 17)
"""Bits that activations, and the weights of fixed sites, may have."""

MIXED = "mixed"
"""The value of ``activation_bits`` that lets calibration choose, site by site."""

NARROW, WIDE = 8, 16
"""The activation bits that calibration chooses from; they take one and two products of 8-bit integers."""

Widths = Mapping[str, int | None]
"""Bits by site name or glob: a name wins over a glob, a later glob over an earlier one."""

ActivationBits = int | None | str | Widths
"""One width for all inputs, None for float, "mixed", or widths of single sites, where all others are mixed."""


def activation_widths(
    given: ActivationBits, sites: Iterable[Site]
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Return the bits of each site's input, and the sites whose input bits calibration will choose (8 until then).

    Raises:
        TypeError, ValueError: ``given`` is not one of :data:`ActivationBits`.
    """
    names = [site.name for site in sites]
    if isinstance(given, str) and given != MIXED:
        raise ValueError(
            f"activation_bits is {given!r}; pass {MIXED!r}, a whole number, None, or a mapping of sites"
        )
    if given == MIXED or isinstance(given, Mapping):
        asked = by_site({} if given == MIXED else given, names, "activation_bits", "to keep its input float")
        return {name: asked.get(name, NARROW) for name in names}, tuple(n for n in names if n not in asked)
    return dict.fromkeys(names, _width(given, "activation_bits", "to keep activations float")), ()


def by_site(given: object, names: Iterable[str], what: str, instead: str) -> dict[str, int | None]:
    """Resolve names and globs to {site: bits}.

    Args:
        given: :data:`Widths`, as the user gave it.
        names: the names of all sites.
        what: the argument's name, for errors.
        instead: the purpose of None, for errors.

    Raises:
        TypeError: ``given`` is not a mapping.
        ValueError: a key matches no site, or a width is out of range.
    """
    names = list(names)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{what} is {given!r}; pass a mapping of site names or globs to bits, such as {{'h_*': 8}}"
        )
    by_glob: dict[str, int | None] = {}
    by_name: dict[str, int | None] = {}
    for key, value in given.items():
        width = _width(value, f"{what}[{key!r}]", instead)
        if key in names:
            by_name[key] = width
            continue
        matches = [name for name in names if fnmatchcase(name, str(key))]
        if not matches:
            near = difflib.get_close_matches(str(key), names)
            meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(
                f"{what} has {key!r}, which matches none of the {len(names)} sites; {meant}"
                "[site.name for site in analyze(model).sites] lists them all"
            )
        by_glob |= dict.fromkeys(matches, width)
    return by_glob | by_name


def _width(value: object, what: str, instead: str) -> int | None:
    """Return a width as an int, or None.

    Raises:
        ValueError: ``value`` is neither in WIDTHS nor None.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) not in WIDTHS:
        raise ValueError(
            f"{what} is {value!r}; pass a whole number from {WIDTHS[0]} to {WIDTHS[-1]}, or None {instead}"
        )
    return int(value)
