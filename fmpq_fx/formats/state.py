"""The state file, in which commands pass on a rewritten graph: everything that training needs, without pickle.

It is a safetensors file. Its tensors are ``model.NAME``, the state dict of the float model with its present weights,
and ``quantizers.SITE.NAME``, the steps and zero points of every site. Its metadata have one entry, ``state`` (several
would be written in an order that changes from run to run), a JSON object of texts:

- ``format``: "fmpq_fx state 1";
- ``model``: the name by which :func:`fmpq_fx.models.zoo.load_model` makes the model ("mbt2018-mean",
  "package.module:callable");
- ``plan``: the plan, as :meth:`fmpq_fx.Plan.to_json` writes it;
- ``history``: the history of fine-tuning, as :meth:`fmpq_fx.History.to_json` writes it; only after fine-tuning.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.history import History
from fmpq_fx.models.zoo import model_of_state
from fmpq_fx.passes.annotation import annotate_graph, graph_note, plan_of
from fmpq_fx.passes.plan.tables import Plan
from fmpq_fx.pipeline import rewrite
from fmpq_fx.quant import QUANTIZERS, quantized_layers
from fmpq_fx.storage.files import replacing
from fmpq_fx.storage.kinds import SAFETENSORS, STATE_FILE, UNKNOWN, kind_of

FORMAT = "fmpq_fx state 1"


def save_state(gm: fx.GraphModule, path: str | os.PathLike[str], *, model: str) -> None:
    """Write the rewritten graph ``gm`` to ``path``.

    Args:
        gm: a graph from :func:`fmpq_fx.prepare` or :func:`fmpq_fx.rewrite`, trained further or not.
        path: the file.
        model: the name by which :func:`fmpq_fx.models.zoo.load_model` makes the model that ``gm`` was made from.

    Raises:
        FmpqError: ``gm`` carries no plan.
        FileNotFoundError: there is no such folder.
    """
    note = graph_note(gm)
    about = {"format": FORMAT, "model": model, "plan": plan_of(gm).to_json()}
    if (history := note.history) is not None:
        about["history"] = history.to_json()
    tensors = {f"model.{name}": value for name, value in note.model.state_dict().items()}
    for site, layer in quantized_layers(gm).items():
        for name, value in layer.state_dict().items():
            if name.startswith(QUANTIZERS):
                tensors[f"quantizers.{site}.{name}"] = value
    # Clones, because safetensors refuses tensors that share memory, and models may.
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as file:
        file.write(safetensors.torch.save(stored, metadata={"state": json.dumps(about)}))


def load_state(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Return the graph that :func:`save_state` wrote to ``path``, on the CPU and in evaluation mode.

    It has the dtype in which its model is made, float32 for models of the zoo.

    Raises:
        FmpqError: the file is no state file, or its model cannot be made.
    """
    with _opened(Path(path)) as (about, stored):
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no dict)
    try:
        spec, plan = about["model"], Plan.from_json(about["plan"])
        model = model_of_state(spec, _under("model.", tensors))
        gm = rewrite(model.eval(), plan)
        for site, layer in quantized_layers(gm).items():
            state = _under(f"quantizers.{site}.", tensors)
            expected = {name for name in layer.state_dict() if name.startswith(QUANTIZERS)}
            if set(state) != expected:
                raise KeyError(f"steps of {site}")
            layer.load_state_dict(state, strict=False)
        if "history" in about:
            annotate_graph(gm, history=History.from_json(about["history"]))
    except KeyError as error:
        raise FmpqError(f"{path} is damaged: it has no {error}") from error
    return gm


def spec_of(path: str | os.PathLike[str]) -> str:
    """Return the ``model`` that :func:`save_state` wrote to the state file ``path``.

    Raises:
        FmpqError: the file is no state file.
    """
    with _opened(Path(path)) as (about, _):
        return about["model"]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, str], Any]]:
    """Yield the texts in the metadata of the state file ``path``, and the opened file to read tensors from."""
    if not path.is_file():
        raise FmpqError(f"there is no file {path}; 'fmpq-fx prepare … --out {path}' writes one")
    if (kind := kind_of(path)) not in (STATE_FILE, SAFETENSORS, UNKNOWN):
        raise FmpqError(
            f"{path} is {kind.what}, not a file that 'fmpq-fx prepare … --out' wrote; {kind.remedy}"
        )
    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("state", "{}"))
            if about.get("format") != FORMAT:
                given = about.get("format", "no format of ours")
                raise FmpqError(
                    f"{path} has {given!r}, expected {FORMAT!r}, as 'fmpq-fx prepare … --out' writes it"
                )
            yield about, stored
    except SafetensorError as error:
        raise FmpqError(f"{path} is not a file that 'fmpq-fx prepare … --out' wrote: {error}") from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
