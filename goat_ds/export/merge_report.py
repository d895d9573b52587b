"""What an export wrote, and how near it is to what was trained: ``export_report.json``, ``merge_report.json``."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from goat_ds.export.adapter_file import Adapter
from goat_ds.export.calibration import TokenSource
from goat_ds.export.dequantize import MergeBase
from goat_ds.export.divergence import Comparison, Reference
from goat_ds.export.fit import Fit, LayerFit
from goat_ds.export.merge import Merge
from goat_ds.export.refine import Refined
from goat_ds.export.stored_base import StoredBase
from goat_ds.precision import dtype_name

REPORT_NAME = "export_report.json"
MERGE_REPORT_NAME = "merge_report.json"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What stands beside the exported weights."""

    mode: str
    """adapter, exact, dense or lora."""
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
        _write(self, folder / REPORT_NAME)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One model on the held-out tokens; losses are means over label tokens."""

    loss: float
    perplexity: float
    kl: float
    """Mean divergence of the trained model from this one, in nats."""
    agreement: float
    """Share of label positions at which both find the same token most probable."""

    @classmethod
    def of(cls, comparison: Comparison | None) -> "Judged | None":
        """Take a comparison over, where there is one."""
        if comparison is None:
            return None
        return cls(**comparison._asdict(), perplexity=comparison.perplexity)


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What a dense form misses of one layer's mixture: mean square of outputs, as a share of the mixture's own."""

    path: str
    unexplained: float
    unexplained_by_mean: float


@dataclass(frozen=True, kw_only=True)
class MergeReport(ExportReport):
    """What stands beside merged weights: what merging cost."""

    fit: str | None
    """How layers got their dense form; None: they were trained in it."""
    calibration: str | None
    """What was fitted on."""
    calibration_tokens: int
    """How many tokens."""
    heldout: str | None
    """What was compared on; None: nothing was compared."""
    heldout_labels: int
    """How many label tokens."""
    trained_loss: float | None
    """Mean loss of the trained model over them."""
    mean_gates: Judged | None
    """The model with every gate at its mean, the usual way to merge."""
    merged: Judged | None
    """What was written."""
    gap_closed: float | None
    """Share of the loss that mean gates lose and this does not; None where they lose nothing."""
    refine_steps: int
    """Steps of refinement."""
    refine_kept: bool
    """Whether it made the divergence smaller and was kept."""
    fitted: Judged | None
    """The fit alone, where it was refined."""
    layers: list[MergedLayer]
    """The worst first."""

    def write(self, folder: Path) -> None:
        """Write the report into the exported folder."""
        _write(self, folder / MERGE_REPORT_NAME)

    def table(self) -> list[str]:
        """Show it in lines for the screen."""
        if self.trained_loss is None or self.merged is None:
            return ["nothing was compared: no held-out tokens"]
        lines = [f"{self.heldout_labels:,} label tokens of {self.heldout}:"]
        lines += [f"  {'':<16}{'loss':>9}{'perplexity':>12}{'KL':>11}{'same token':>12}"]
        perplexity = math.exp(min(self.trained_loss, 700.0))
        lines += [f"  {'as trained':<16}{self.trained_loss:9.4f}{perplexity:12.4f}{0:11.2e}{1:12.1%}"]
        for name, judged in (("mean gates", self.mean_gates), ("fitted", self.fitted), ("as written", self.merged)):
            if judged:
                lines.append(
                    f"  {name:<16}{judged.loss:9.4f}{judged.perplexity:12.4f}{judged.kl:11.2e}{judged.agreement:12.1%}"
                )
        if self.gap_closed is not None:
            lines.append(f"  closed {self.gap_closed:.1%} of what mean gates lose")
        if self.refine_steps:
            kept = "kept" if self.refine_kept else "not kept: the divergence did not become smaller"
            lines.append(f"  {self.refine_steps} steps of refinement, {kept}")
        if self.layers:
            worst = ", ".join(f"{layer.path} {layer.unexplained:.2f}" for layer in self.layers[:5])
            lines.append(f"  least explained layers (share of the mixture's output missed): {worst}")
        return lines


def merge_report(
    mode: str,
    merge: Merge,
    *,
    fit: str | None,
    fits: Mapping[str, LayerFit],
    source: TokenSource | None,
    num_tokens: int,
    reference: Reference | None,
    mean_gates: Comparison | None,
    refined: Refined | None,
    written: Comparison | None,
) -> MergeReport:
    """Report on merged weights, dense or as LoRA.

    Args:
        mode: dense or lora.
        merge: What was merged with what.
        fit: How layers got their dense form; None: they had it.
        fits: By layer.
        source: Of the tokens, if there are any.
        num_tokens: That were fitted on.
        reference: The trained model on the held-out tokens.
        mean_gates: The model with mean gates on them.
        refined: What refinement did.
        written: The model that was written on them.
    """
    shared = asdict(_report(mode, merge.adapter, merge.base, merge.merge_base, _merged_values(merge)))
    misses = [
        MergedLayer(
            path=path,
            # With mean gates the fit was not taken.
            unexplained=found.unexplained if fit == Fit.LEAST_SQUARES else found.unexplained_by_mean,
            unexplained_by_mean=found.unexplained_by_mean,
        )
        for path, found in fits.items()
    ]
    return MergeReport(
        **shared,
        fit=None if fit is None else str(fit),
        calibration=source.calibration_name if source and fits else None,
        calibration_tokens=num_tokens,
        heldout=source.heldout_name if source and reference else None,
        heldout_labels=reference.packs.num_labels if reference else 0,
        trained_loss=reference.loss if reference else None,
        mean_gates=Judged.of(mean_gates),
        merged=Judged.of(written),
        gap_closed=_gap_closed(reference, mean_gates, written),
        refine_steps=refined.num_steps if refined else 0,
        refine_kept=refined.is_kept if refined else False,
        fitted=Judged.of(refined.before) if refined else None,
        layers=sorted(misses, key=lambda layer: layer.unexplained, reverse=True),
    )


def _gap_closed(reference: Reference | None, mean_gates: Comparison | None, written: Comparison | None) -> float | None:
    if reference is None or mean_gates is None or written is None or mean_gates.loss <= reference.loss:
        return None
    return (mean_gates.loss - written.loss) / (mean_gates.loss - reference.loss)


def _merged_values(merge: Merge) -> str:
    trained, base = merge.adapter.quantization, merge.base
    if trained and merge.merge_base is MergeBase.W16:
        return f"not those of training, which computed with 4-bit weights ({trained.packing})"
    if base.is_4bit and not trained:
        return "not those of training, which had an unquantised base"
    if merge.adapter.is_routed:
        return "the nearest dense ones: what experts add depends on the token, and this does not"
    return "those of training up to one rounding: the adapter was dense already"


def _write(report: ExportReport, path: Path) -> None:
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


class Exported(NamedTuple):
    """What was read and what was written."""

    adapter: Adapter
    report: ExportReport


def adapter_report(adapter: Adapter, base: StoredBase) -> ExportReport:
    """Report on an adapter folder."""
    return _report("adapter", adapter, base, None, "the adapter's tensors, bit for bit; no weight of the base")


def exact_report(adapter: Adapter, base: StoredBase, *, merge_base: MergeBase, dtype: torch.dtype) -> ExportReport:
    """Report on an exact folder.

    Args:
        adapter: What was exported.
        base: What was read.
        merge_base: Which of its weights were written.
        dtype: That the folder loads in.
    """
    return _report("exact", adapter, base, merge_base, _values(adapter, base, merge_base, dtype))


def _report(mode: str, adapter: Adapter, base: StoredBase, merge_base: MergeBase | None, values: str) -> ExportReport:
    return ExportReport(
        mode=mode,
        base=hub_name(base.name) or base.path.name,
        step=adapter.step,
        base_quantization=adapter.config.base_quantization,
        merge_base=merge_base,
        values=values,
    )


def hub_name(base: str) -> str | None:
    """Return a base as the hub knows it; a path on the disk of the training machine means nothing there."""
    return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None


def _values(adapter: Adapter, base: StoredBase, merge_base: MergeBase, dtype: torch.dtype) -> str:
    trained = adapter.quantization
    if trained and merge_base is MergeBase.W16:
        return f"not those of training, which computed with 4-bit weights ({trained.packing})"
    if base.is_4bit and not trained:
        return "not those of training, which had an unquantised base"
    if trained and trained.compute_dtype != dtype_name(adapter.dtype):
        return (
            f"those of training up to rounding: 4-bit layers computed in {trained.compute_dtype} there, and their "
            f"weights are {dtype_name(dtype)} here"
        )
    if adapter.dtype != dtype:
        return (
            f"those of training up to rounding: the adapter's tensors are {dtype_name(adapter.dtype)}, and the folder "
            f"loads in {dtype_name(dtype)}"
        )
    if trained and not base.is_4bit:
        return "exactly those of training, where bitsandbytes quantises the base here as it did there"
    return "exactly those of training"
