"""How a trained model leaves: as a PEFT adapter, or as a Hugging Face folder that computes exactly what was trained."""

from goat_ds.export.adapter import export_adapter
from goat_ds.export.checkpoint import Adapter, find_adapter, read_adapter
from goat_ds.export.dequantize import MergeBase
from goat_ds.export.exact import export_exact
from goat_ds.export.report import Exported

__all__ = ["Adapter", "Exported", "MergeBase", "export_adapter", "export_exact", "find_adapter", "read_adapter"]
