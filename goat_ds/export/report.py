"""What an export wrote, and how near it is to what was trained: ``export_report.json``."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from goat_ds.export.base import Base
from goat_ds.export.checkpoint import Adapter
from goat_ds.export.dequantize import MergeBase

REPORT_NAME = "export_report.json"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What stands beside the exported weights."""

    mode: str
    """adapter or exact."""
    base: str
    """The base that was read: its hub name, or its folder's name."""
    step: int | None
    """Of the training run, where the checkpoint says so."""
    base_quantization: dict[str, Any] | None
    """How the base was quantised in training; None: not at all."""
    merge_base: MergeBase | None
    """Which weights of the base were written; None: none."""
    values: str
    """Whether they are those of training, and why not."""

    def write(self, folder: Path) -> None:
        """Write the report into the exported folder."""
        (folder / REPORT_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class Exported(NamedTuple):
    """What was read and what was written."""

    adapter: Adapter
    report: ExportReport


def adapter_report(adapter: Adapter, base: Base) -> ExportReport:
    """Report on an adapter folder."""
    return _report("adapter", adapter, base, None, "the adapter's tensors, bit for bit; no weight of the base")


def exact_report(adapter: Adapter, base: Base, *, merge_base: MergeBase, dtype: torch.dtype) -> ExportReport:
    """Report on an exact folder.

    Args:
        adapter: What was exported.
        base: What was read.
        merge_base: Which of its weights were written.
        dtype: That the folder loads in.
    """
    return _report("exact", adapter, base, merge_base, _values(adapter, base, merge_base, dtype))


def _report(mode: str, adapter: Adapter, base: Base, merge_base: MergeBase | None, values: str) -> ExportReport:
    return ExportReport(
        mode=mode,
        base=hub_name(base.name) or base.path.name,
        step=adapter.step,
        base_quantization=adapter.config.base_quantization,
        merge_base=merge_base,
        values=values,
    )


def hub_name(base: str) -> str | None:
    """Give a base as the hub knows it; a path on the disk of the training machine means nothing there."""
    return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None


def _values(adapter: Adapter, base: Base, merge_base: MergeBase, dtype: torch.dtype) -> str:
    trained = adapter.quantization
    if trained and merge_base is MergeBase.W16:
        return f"not those of training, which computed with 4-bit weights ({trained.packing})"
    if base.is_4bit and not trained:
        return "not those of training, which had an unquantised base"
    if trained and trained.compute_dtype != _named(adapter.dtype):
        return (
            f"those of training up to rounding: 4-bit layers computed in {trained.compute_dtype} there, and their "
            f"weights are {_named(dtype)} here"
        )
    if adapter.dtype != dtype:
        return (
            f"those of training up to rounding: the adapter's tensors are {_named(adapter.dtype)}, and the folder "
            f"loads in {_named(dtype)}"
        )
    if trained and not base.is_4bit:
        return "exactly those of training, where bitsandbytes quantises the base here as it did there"
    return "exactly those of training"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
