"""How a trained model leaves: as a PEFT adapter, exactly as it was trained, or as dense weights near it."""

from goat_ds.export.adapter import export_adapter
from goat_ds.export.adapter_file import Adapter, find_adapter, find_trained, read_adapter
from goat_ds.export.dense import Dense, Fitting, export_dense, export_lora
from goat_ds.export.dequantize import MergeBase
from goat_ds.export.exact import export_exact
from goat_ds.export.fit import Fit
from goat_ds.export.merge_report import Exported, ExportReport, MergeReport
from goat_ds.export.rivals import Rival, check_rival_base, copy_rival, find_rival, merge_rival, was_4bit

__all__ = [
    "Adapter",
    "Dense",
    "ExportReport",
    "Exported",
    "Fit",
    "Fitting",
    "MergeBase",
    "MergeReport",
    "Rival",
    "check_rival_base",
    "copy_rival",
    "export_adapter",
    "export_dense",
    "export_exact",
    "export_lora",
    "find_adapter",
    "find_rival",
    "find_trained",
    "merge_rival",
    "read_adapter",
    "was_4bit",
]
