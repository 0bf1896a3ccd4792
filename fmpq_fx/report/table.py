"""Print the plan that a rewritten graph carries as a table."""

import math
import textwrap
from collections import Counter
from typing import Any

from tabulate import SEPARATING_LINE, tabulate
from torch import fx, nn

from fmpq_fx.passes.annotation import graph_note, plan_of
from fmpq_fx.passes.plan.tables import FLOAT_BITS, Plan
from fmpq_fx.passes.plan.widths import NARROW
from fmpq_fx.rd import MSE

WIDTH = 96  # columns; lines below the table are wrapped to it
GROUPS = 4  # kinds of float parameters that are listed; the others are added up


def bit_table(gm: fx.GraphModule) -> str:
    """Return the bits of every site of ``gm`` as a table, with the target and the cost of the plan below it.

    A row is a site, in the order of the graph. "bits" is the width of its weights, "input" that of its input. Zeta is
    monotone and in % of the float model's RD loss, "-" if not known, with "~" before it if interpolated. Bytes are
    nominal, parameters * bits / 8, or coded, as the plan counts them; share is in % of all sites' bytes. Below are the
    size, the float parameters, the search, and the RD loss, rate + lambda * distortion in bits per pixel (255^2 * MSE
    if no other distortion is named).

    Raises:
        FmpqError: ``gm`` is not the result of ``prepare`` or ``rewrite``.
    """
    plan = plan_of(gm)
    opaque = _opaque_modules(gm, plan)
    rows: list[Any] = []
    for site in plan.sites:
        b, name = plan.bits[site.name], site.name + " *" * (site.name in opaque)
        inputs = plan.activation_bits[site.name] if b is not None else None
        widths = _width(b), _width(inputs)
        zeta = "~" * plan.interpolates(site.name) + _zeta(plan.zeta_of(site.name))
        rows.append((name, site.kind, *_numbers(plan, site.params, widths, zeta, plan.bytes_of(site))))
    params = sum(site.params for site in plan.sites)
    average = f"{plan.average_bits:.1f}", f"{plan.average_activation_bits:.1f}"
    total = _numbers(plan, params, average, _zeta(plan.predicted), plan.size_bytes)
    rows += [SEPARATING_LINE, (_count(len(plan.sites), "site"), "", *total)]
    size = "bytes" if plan.coded is None else "coded bytes"
    header = ("node", "kind", "parameters", "bits", "input", "zeta %", size, "share %")
    aligned = ("left", "left", *["right"] * 6)
    table = tabulate(rows, header, "simple", disable_numparse=True, colalign=aligned)
    if opaque:
        holders = ", ".join(f"{name} ({_count(n, 'site')})" for name, n in Counter(opaque.values()).items())
        table += "\n" + _wrap(f"* inside a module that is one node of the graph: {holders}", WIDTH)
    return f"{table}\n\n{_footer(gm, plan)}"


def _numbers(plan: Plan, params: int, widths: tuple[str, str], zeta: str, size: float) -> tuple[str, ...]:
    return f"{params:,}", *widths, zeta, f"{size:,.0f}", f"{100 * size / plan.size_bytes:.1f}"


def _opaque_modules(gm: fx.GraphModule, plan: Plan) -> dict[str, str]:
    """Return {site: module} for the sites inside a module that the graph runs as a whole."""
    targets = {node.name: str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    holder = {site.name: targets.get(site.node, site.name) for site in plan.sites}
    return {site: module for site, module in holder.items() if module != site}


def _footer(gm: fx.GraphModule, plan: Plan) -> str:
    """Return the lines below the table about the whole plan: a name and a text each, aligned."""
    search = plan.planner
    if plan.beta is not None:
        search += f", beta {plan.beta:.3g} (zeta < {100 * plan.beta:.3g} %)"
    if plan.history:
        search += f", {_count(len(plan.history), 'search step')}"
    lines = {
        "average bits": short_bits(plan),
        "operations": _operations(plan),
        "size": sizes(plan),
        "CR": f"{plan.cr:.4f} ({factor(plan.cr)}), target {plan.target_cr:.4g} ({factor(plan.target_cr)})",
        "stays float": _float_remainder(gm, plan),
        "left out": "; ".join(f"{name}: {why}" for name, why in plan.left_out.items()),
        "planner": search,
        "zeta": ""
        if plan.sensitivity.complete
        else f"{plan.sensitivity.extent}, as many as the plan rests on",
        "lambda": f"{plan.lmbda:.4g}",
        "distortion": "" if plan.metric == MSE.name else plan.metric,
        "RD loss": _rd_loss(plan),
        "images": _images(plan),
        "fine-tuned": _fine_tuned(gm),
        "remarks": plan.remarks,
    }
    column = max(map(len, lines)) + 2
    rows = [(name, _wrap(text, WIDTH - column)) for name, text in lines.items() if text]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _float_remainder(gm: fx.GraphModule, plan: Plan) -> str:
    """Return the number of parameters that belong to no site, and their kinds, as a text."""
    kinds: Counter[str] = Counter()
    for name, count in plan.float_remainder.items():
        kinds[_kind_of(name, gm, plan)] += count
    if not kinds:
        return "nothing else"
    named = dict(kinds.most_common(GROUPS))
    named["others"] = kinds.total() - sum(named.values())
    size = _size(kinds.total() * FLOAT_BITS / 8)
    parts = ", ".join(f"{kind} {count:,}" for kind, count in named.items() if count)
    return f"{_count(kinds.total(), 'more parameter')}, {size}: {parts}"


def _kind_of(parameter: str, gm: fx.GraphModule, plan: Plan) -> str:
    """Return the kind of a parameter: its role in a site ("bias"), else the class that holds it, else its name."""
    owner, _, name = parameter.rpartition(".")
    if owner in plan.bits:
        return name
    modules: dict[str, Any] = dict(gm.named_modules())
    while isinstance(modules.get(owner), nn.ParameterList | nn.ParameterDict):
        owner, _, name = owner.rpartition(".")
    # In the place of a module that was traced into, a graph has a plain Module; the root is the GraphModule.
    holder = type(modules.get(owner, gm))
    return name if holder in (type(gm), nn.Module) else holder.__name__


def _rd_loss(plan: Plan) -> str:
    unknown = sum(math.isnan(plan.zeta_of(site.name)) for site in plan.sites)
    guessed = sum(plan.interpolates(site.name) for site in plan.sites)
    promise = f"sum of zeta: {percent(plan.predicted)}"
    if unknown == len(plan.sites):
        promise = "zeta was not measured"
        unknown = 0
    for count, what in ((unknown, "unknown"), (guessed, "interpolated")):
        promise += f", {_count(count, 'site')} {what}" if count else ""
    if plan.measured is None:
        return f"not measured ({promise})"
    base, weights, both = plan.measured.float_rd, plan.measured.weights_rd, plan.measured.rd
    rows = [
        ("float", f"{base:.4f}", "", ""),
        ("weights quantized", f"{weights:.4f}", percent(weights / base - 1), f"({promise})"),
        ("activations too", f"{both:.4f}", percent(both / base - 1), ""),
    ]
    if not plan.rounded_inputs:
        rows.pop()
    aligned = ("left", "right", "right", "left")
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=aligned)


def _fine_tuned(gm: fx.GraphModule) -> str:
    """Return the changes by fine-tuning as a text; the RD losses above it are from before fine-tuning."""
    history = graph_note(gm).history
    if history is None:
        return ""
    first, best, settings = history.validation[0], history.best, history.settings
    name = "RD loss" if settings.loss == "rd" else "MSE"
    change = percent(best.rd_loss / first.rd_loss - 1)
    size = "" if first.cr is None or best.cr is None else f", coded CR {first.cr:.4f} -> {best.cr:.4f}"
    return (
        f"{_count(len(history.losses), 'step')} with the {name}; after that, on {history.validated_on}: RD loss "
        f"{first.rd_loss:.4f} -> {best.rd_loss:.4f} ({change}){size}, kept from step {best.step}"
    )


def _images(plan: Plan) -> str:
    """Return the images that zeta was measured on, and whether the RD loss was measured on others, as a text."""
    words, seen = plan.sensitivity.images or "not recorded", plan.sensitivity.float_rd
    if plan.measured is None or math.isclose(plan.measured.float_rd, seen, rel_tol=1e-3):
        return words
    return f"{words} for zeta (float RD loss {seen:.4f}); others for the RD loss above"


def short_bits(plan: Plan) -> str:
    """Return the average bits in the usual short form: W6.1A8.3, W8A8 if averages are whole, A32 for float."""
    averages = ("W", plan.average_bits), ("A", plan.average_activation_bits)
    return "".join(f"{name}{bits:.1f}".removesuffix(".0") for name, bits in averages)


def _operations(plan: Plan) -> str:
    """Return the number of integer products of the plan as a text; "" if they were not counted."""
    if not plan.macs or not plan.rounded_inputs:
        return ""
    count, least = plan.products(), plan.products(NARROW)
    more = f", {100 * (count / least - 1):.0f} % more than with inputs of {NARROW} bits" * (count > least)
    return f"{count:,.0f} products of 8-bit integers per pixel{more}"


def factor(cr: float) -> str:
    """Return a CR as a factor: "4.0x smaller" for 0.25."""
    return f"{1 / cr:.1f}x smaller"


def sizes(plan: Plan) -> str:
    """Return the size that the plan counts, with the float32 size, as a text."""
    size, full = (_size(count, plan.size_bytes) for count in (plan.size_bytes, plan.float_bytes))
    if plan.coded is None:
        return f"{size} instead of {full} (float32)"
    nominal = _size(plan.nominal_bytes, plan.size_bytes)
    return f"{size} coded (nominal {nominal}) instead of {full} (float32)"


def _size(count: float, beside: float = math.inf) -> str:
    """Return ``count`` bytes to three digits, in the unit of the smaller of ``count`` and ``beside`` (kB is 1000 B)."""
    least = min(count, beside)
    unit, scale = ("MB", 1e6) if least >= 1e6 else ("kB", 1e3) if least >= 1e3 else ("B", 1)
    value = count / scale
    digits = 0 if scale == 1 else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f} {unit}"


def _width(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _zeta(zeta: float) -> str:
    if math.isnan(zeta):
        return "-"
    # Adding zero after rounding turns -0.000 into 0.000.
    return f"{100 * zeta:.0e}" if zeta >= 1e4 else f"{round(100 * zeta, 3) + 0.0:.3f}"


def percent(fraction: float) -> str:
    """Return ``fraction`` as a signed percentage."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f} %"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))
