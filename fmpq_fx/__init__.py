"""FMPQ-FX: mixed-precision quantization of learned image compression models, as a torch.fx compiler pass.

The method is FMPQ (Hossain, Duan, Zhu, "Flexible Mixed Precision Quantization for Learned Image Compression",
arXiv 2506.01221). Two arguments are enough::

    gm = fmpq_fx.prepare(model, 0.25)
    print(fmpq_fx.bit_table(gm))
"""

from fmpq_fx import _compressai, ranks, samples  # noqa: F401  (_compressai comes first: see there)
from fmpq_fx.coding.conversion import convert, export_checkpoint
from fmpq_fx.coding.evaluation import Evaluation, evaluate
from fmpq_fx.coding.fmi import decode, encode
from fmpq_fx.errors import FmpqError
from fmpq_fx.formats.model_file import load, load_codec, save
from fmpq_fx.history import History
from fmpq_fx.onnx.export import export_onnx
from fmpq_fx.onnx.manifest import OnnxManifest
from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.plan.tables import Measured, Plan, Sensitivity, Site
from fmpq_fx.pipeline import analyze, prepare, rewrite
from fmpq_fx.report.exact_layers import exact_table
from fmpq_fx.report.file_bytes import FileReport, file_report
from fmpq_fx.report.picture import plot_plan
from fmpq_fx.report.table import bit_table
from fmpq_fx.training.finetuning import finetune

__all__ = [
    "Evaluation",
    "FileReport",
    "FmpqError",
    "History",
    "Measured",
    "OnnxManifest",
    "Plan",
    "Sensitivity",
    "Site",
    "analyze",
    "bit_table",
    "convert",
    "decode",
    "encode",
    "evaluate",
    "exact_table",
    "export_checkpoint",
    "export_onnx",
    "file_report",
    "finetune",
    "load",
    "load_codec",
    "plan_of",
    "plot_plan",
    "prepare",
    "ranks",
    "rewrite",
    "samples",
    "save",
]
