"""Write a routed model as dense weights: a folder of the original architecture, or a plain LoRA adapter.

    routed model ──► calibration tokens ──► A' of every layer (fit) ──► end to end (refine) ──► W + s B A' - s/E B0 A0
          └────────► held-out tokens ─────► what merging costs: merge_report.json

A routed mixture depends on the token, so this is the nearest dense model and not the trained one; a dense adapter
(``GoatConfig.routed`` is False) is dense already and loses nothing. Weights go from file to file one at a time.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from goat_ds.data.sample import NUM_TOKENS
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, ExportError
from goat_ds.export.adapter_file import Adapter, read_low_rank
from goat_ds.export.base_tensors import base_tensors, check_fit
from goat_ds.export.calibration import NamedData, Packs, TokenSource, find_tokens, packs_of
from goat_ds.export.card import dense_card, lora_card
from goat_ds.export.dequantize import MergeBase, choose_weights
from goat_ds.export.divergence import Comparison, Reference, compare, take_reference
from goat_ds.export.fit import Fit, LayerFit, fit_layers
from goat_ds.export.folder import check_new, check_room, new_folder
from goat_ds.export.merge import DeltaOf, Merge, dense_config, dense_tensors, write_lora
from goat_ds.export.merge_report import MergeReport, merge_report
from goat_ds.export.refine import Refined, refine
from goat_ds.export.same_base import check_base
from goat_ds.export.stored_base import copy_terms, copy_tokenizer, find_base
from goat_ds.export.tensors import plan_shards, write_shards
from goat_ds.export.trained import DENSE, TrainedModel, base_model, load_trained
from goat_ds.method.dense_fit import TOKENS_PER_FEATURE
from goat_ds.method.spectrum import Factors


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a routed model becomes dense, and how that is judged."""

    fit: Fit | None = None
    """How every layer gets its dense form; least squares by default."""
    calibration: tuple[str, ...] = ()
    """Data to fit on, in any training format; empty: the sample kept with the checkpoint."""
    split: str | None = None
    """Of hub data sets and folders to fit on; train by default."""
    calibration_tokens: int | None = None
    """Tokens to fit on, up to the end of a document; 131,072 by default."""
    refine_steps: int = 0
    """Steps of distilling the routed model into the dense form; 0: none."""
    heldout: tuple[str, ...] = ()
    """Data to compare on; empty: the sample's, or a part of ``calibration`` set aside."""
    heldout_split: str | None = None
    """Of hub data sets and folders to compare on; test by default."""
    heldout_labels: int = 2_048
    """Label tokens to compare on; the trained model's logits are kept for each. 0: no comparison."""
    max_length: int | None = None
    """Tokens of the longest record of data that is named; as in the run by default, where that is known."""
    max_kl: float | None = None
    """Bound of the mean divergence in nats above which nothing is written; None: no bound."""

    def problems(self, *, routed: bool) -> list[str]:
        """Return what is wrong, one line each.

        Args:
            routed: Whether the adapter has anything to fit.
        """
        found = [
            f"{name} ({value}) must be at least {least}"
            for name, value, least in (
                ("calibration_tokens", self.calibration_tokens, 1),
                ("refine_steps", self.refine_steps, 0),
                ("heldout_labels", self.heldout_labels, 0),
                ("max_length", self.max_length, 2),
            )
            if value is not None and value < least
        ]
        if self.max_kl is not None and not self.max_kl > 0:
            found.append(f"max_kl ({self.max_kl}) must be above 0")
        if self.max_kl is not None and not self.heldout_labels:
            found.append(f"max_kl ({self.max_kl}) needs a comparison; give heldout_labels above 0")
        if self.refine_steps and not self.heldout_labels:
            found.append(f"refine_steps ({self.refine_steps}) needs a comparison; give heldout_labels above 0")
        for name, value, reason in self._useless(routed):
            found.append(f"{name} ({value}) has no effect: {reason}; leave it out")
        same_split = (self.split or "train") == (self.heldout_split or "test")
        if both := [s for s in self.calibration if s in self.heldout and (same_split or Path(s).is_file())]:
            found.append(f"heldout ({' '.join(both)}) is fitted on; compare on other data, or leave heldout out")
        return found

    def _useless(self, routed: bool) -> Iterator[tuple[str, object, str]]:
        """Yield what is given and does nothing: its name, its value and why."""
        is_dense = "the adapter is dense already"
        for name in ("fit", "calibration_tokens", "refine_steps"):
            if getattr(self, name) and not routed:
                yield name, getattr(self, name), is_dense
        if self.calibration and not routed:
            yield "calibration", " ".join(self.calibration), is_dense
        for name, sources in (("split", "calibration"), ("heldout_split", "heldout")):
            if getattr(self, name) and not getattr(self, sources):
                yield name, getattr(self, name), f"{sources} names no data"
        if self.max_length and not (self.calibration or self.heldout):
            yield "max_length", self.max_length, "no data is named"
        if self.heldout and not self.heldout_labels:
            yield "heldout", " ".join(self.heldout), "heldout_labels is 0"

    @property
    def chosen_fit(self) -> Fit:
        """The fit, settled."""
        return self.fit or Fit.LEAST_SQUARES


class Dense(NamedTuple):
    """What an export wrote, on the rank that wrote it; None on others."""

    adapter: Adapter
    report: MergeReport | None


class _Settled(NamedTuple):
    """The dense form of a model, and what is known of it."""

    delta_of: DeltaOf
    fits: dict[str, LayerFit]
    source: TokenSource | None
    num_tokens: int
    reference: Reference | None
    mean_gates: Comparison | None
    refined: Refined | None


def export_dense(
    checkpoint: str | Path,
    *,
    output: str | Path,
    base: str | None = None,
    merge_base: MergeBase | None = None,
    fitting: Fitting | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Dense:
    """Write the nearest dense model to ``output``, a folder of the base's own architecture. A collective.

    Args:
        checkpoint: An adapter folder, a checkpoint folder, or the output_dir of a run (its newest checkpoint).
        output: A new folder.
        base: Folder or hub name of the base, in place of the one in the adapter's config.
        merge_base: Which weights of the base are merged with; None: what the adapter was trained on.
        fitting: How, and how it is judged.
        dtype: Of the weights written, and of the models compared; None: as on disk and as in training.
        max_shard_size: Bytes of one weights file, such as ``5GB``.

    Raises:
        ConfigError: an argument is wrong, or there are too few tokens to fit on.
        ExportError: adapter or base is not whole, they do not fit each other, or the divergence is above ``max_kl``.
    """
    fitting = fitting or Fitting()
    merge = _merge(checkpoint, output, base, merge_base, fitting, dtype, mode="dense")
    tensors = dense_tensors(merge)
    # Laid out before anything expensive, so that a size that is none is refused at once.
    shards = plan_shards(tensors, max_shard_size)
    if ranks.is_first():
        check_room(Path(output), sum(tensor.num_bytes for tensor in tensors.values()))
    settled = _settle(merge, fitting)
    if not ranks.is_first():
        return Dense(merge.adapter, None)
    with new_folder(Path(output)) as folder:
        write_shards(dense_tensors(merge, settled.delta_of), shards, folder)
        dense_config(merge).save_pretrained(folder)
        copy_terms(merge.base.path, folder)
        report = _judged(merge, fitting, settled, "dense", folder, lambda: _load_dense(folder, merge))
        (folder / "README.md").write_text(dense_card(merge.adapter, report, title=Path(output).name), encoding="utf-8")
    return Dense(merge.adapter, report)


def export_lora(
    checkpoint: str | Path,
    *,
    output: str | Path,
    base: str | None = None,
    merge_base: MergeBase | None = None,
    fitting: Fitting | None = None,
    dtype: torch.dtype | None = None,
) -> Dense:
    """Write the nearest dense model to ``output`` as a plain LoRA adapter of the base, of rank 2 r at most.

    A collective. Arguments, result and errors are those of ``export_dense``; factors are written in fp32.
    """
    fitting = fitting or Fitting()
    merge = _merge(checkpoint, output, base, merge_base, fitting, dtype, mode="lora")
    if merge.initial_is_packed:
        raise ConfigError(
            "merge_base (dequant_w4): residual fold was packed into the 4-bit weights, so no LoRA adapter of the base "
            "equals this model; use --merge_base w16, or --mode dense"
        )
    settled = _settle(merge, fitting)
    if not ranks.is_first():
        return Dense(merge.adapter, None)
    with new_folder(Path(output)) as folder:
        write_lora(merge, settled.delta_of, folder)
        report = _judged(merge, fitting, settled, "lora", folder, lambda: _load_lora(folder, merge))
        card = lora_card(merge.adapter, report, base=merge.base.name, title=Path(output).name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Dense(merge.adapter, report)


def _merge(
    checkpoint: str | Path,
    output: str | Path,
    base: str | None,
    merge_base: MergeBase | None,
    fitting: Fitting,
    dtype: torch.dtype | None,
    *,
    mode: str,
) -> Merge:
    check_new(Path(output))
    adapter = read_low_rank(Path(checkpoint), mode=mode)
    if problems := fitting.problems(routed=adapter.is_routed):
        raise ConfigError(*problems)
    found = find_base(adapter, base, weights=True)
    check_fit(adapter, found.skeleton)
    merge = Merge(adapter, found, choose_weights(adapter, found, merge_base), dtype)
    # Lays the tensors out, so that a layer that is missing is reported as such and not as another base.
    dense_tensors(merge)
    check_base(adapter, found)
    return merge


def _settle(merge: Merge, fitting: Fitting) -> _Settled:
    """Find the dense form, and what the trained model says on held-out tokens. A collective."""
    source = _tokens(merge, fitting)
    calibration = heldout = None
    if source and merge.adapter.is_routed:
        calibration = packs_of(source.sample.calibration, merge.base, max_length=source.sample.max_length)
        _check_enough(merge.adapter, calibration, fitting)
    if source and fitting.heldout_labels and len(source.sample.heldout):
        heldout = packs_of(source.sample.heldout, merge.base, max_length=source.sample.max_length)
    _check_comparable(fitting, heldout)
    if calibration is None and heldout is None:
        return _Settled(merge.stored_delta, {}, source, 0, None, None, None)
    # The reference is what was trained, whichever weights of the base it is then merged with.
    trained_on = choose_weights(merge.adapter, merge.base, None)
    trained = load_trained(merge.adapter, merge.base, trained_on, dtype=merge.compute_dtype)
    reference = take_reference(trained.model, heldout) if heldout else None
    if calibration is None:
        return _Settled(merge.stored_delta, {}, source, 0, reference, None, None)
    if merge.merge_base is not trained_on:
        del trained
        gc.collect()
        trained = load_trained(merge.adapter, merge.base, merge.merge_base, dtype=merge.compute_dtype)
    return _fitted(merge, fitting, trained, calibration, source, reference)


def _fitted(
    merge: Merge,
    fitting: Fitting,
    trained: TrainedModel,
    packs: Packs,
    source: TokenSource | None,
    reference: Reference | None,
) -> _Settled:
    fits = fit_layers(trained, packs)
    b_of = {path: experts.gated_factors().b_OR.detach().float() for path, experts in trained.experts().items()}
    trained.set_dense({path: merge.delta(path, Factors(fit.mean_RI, b_of[path])) for path, fit in fits.items()})
    mean_gates = _compared(trained, reference, "mean gates")
    if fitting.chosen_fit is Fit.LEAST_SQUARES:
        trained.set_dense({path: merge.delta(path, Factors(fit.fitted_RI, b_of[path])) for path, fit in fits.items()})
    refined = None
    if fitting.refine_steps and reference:
        before = _compared(trained, reference, "fitted")
        assert before is not None
        refined = refine(trained, packs, reference, before, num_steps=fitting.refine_steps)
    deltas = {path: Factors(e.A.detach().cpu(), e.B.detach().cpu()) for path, e in trained.experts(DENSE).items()}
    return _Settled(deltas.__getitem__, fits, source, packs.num_tokens, reference, mean_gates, refined)


def _compared(trained: TrainedModel, reference: Reference | None, name: str) -> Comparison | None:
    if reference is None:
        return None
    with trained.computing_with(DENSE) as model:
        return compare(model, reference, name=name)


def _tokens(merge: Merge, fitting: Fitting) -> TokenSource | None:
    """Find what a fit or a comparison needs; None where neither is to be made."""
    return find_tokens(
        merge.adapter,
        merge.base,
        calibration=NamedData(fitting.calibration, fitting.split or "train"),
        heldout=NamedData(fitting.heldout, fitting.heldout_split or "test"),
        num_tokens=fitting.calibration_tokens or NUM_TOKENS,
        num_heldout_labels=fitting.heldout_labels,
        max_length=fitting.max_length,
    )


def _check_enough(adapter: Adapter, packs: Packs, fitting: Fitting) -> None:
    widest = max(adapter.layers, key=adapter.in_features)
    needed = TOKENS_PER_FEATURE * adapter.in_features(widest) if fitting.chosen_fit is Fit.LEAST_SQUARES else 1
    if packs.num_tokens < needed:
        raise ConfigError(
            f"calibration holds {packs.num_tokens:,} tokens, and the widest layer ({widest}, "
            f"{adapter.in_features(widest):,} in features) needs {needed:,} for fit least_squares; name more data with "
            "--calibration, raise --calibration_tokens, or use --fit mean"
        )
    if len(packs.packs) < ranks.get_world_size():
        raise ConfigError(
            f"calibration fills {len(packs.packs)} rows, fewer than there are ranks ({ranks.get_world_size()}); use "
            "fewer ranks, or more data"
        )


def _check_comparable(fitting: Fitting, heldout: Packs | None) -> None:
    if heldout is None and (fitting.max_kl is not None or fitting.refine_steps):
        name, value = (
            ("max_kl", fitting.max_kl) if fitting.max_kl is not None else ("refine_steps", fitting.refine_steps)
        )
        raise ConfigError(f"{name} ({value}) needs held-out tokens, and there are none; name data with --heldout FILE")


def _judged(
    merge: Merge, fitting: Fitting, settled: _Settled, mode: str, folder: Path, load: Callable[[], Any]
) -> MergeReport:
    """Compare what was written with what was trained, and write the report.

    Raises:
        ExportError: the divergence is above the bound.
    """
    # The run may have added tokens or a chat template to the base's tokenizer.
    for source in (merge.base.path, merge.adapter.path):
        copy_tokenizer(source, folder)
    reference, written = settled.reference, None
    if reference:
        # What was trained refers to itself, and would stay beside what was written until the collector comes.
        gc.collect()
        written = compare(load(), reference, name=f"{mode} as written")
    if written and fitting.max_kl is not None and written.kl > fitting.max_kl:
        raise ExportError(
            f"the {mode} model's mean KL from the trained one is {written.kl:.3g}, above max_kl ({fitting.max_kl:g}), "
            "and nothing was written; refine it (--refine_steps), fit it on more data, train with --dense_finish, or "
            "use --mode exact"
        )
    report = merge_report(
        mode,
        merge,
        fit=fitting.chosen_fit if settled.fits else None,
        fits=settled.fits,
        source=settled.source,
        num_tokens=settled.num_tokens,
        reference=reference,
        mean_gates=settled.mean_gates,
        refined=settled.refined,
        written=written,
    )
    report.write(folder)
    return report


def _load_dense(folder: Path, merge: Merge) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=merge.compute_dtype, trust_remote_code=False)
    return model.to(ranks.device()).eval()


def _load_lora(folder: Path, merge: Merge) -> Any:
    tensors = base_tensors(merge.adapter, merge.base, merge.merge_base, folded=False)
    base = base_model(merge.adapter, merge.base, tensors, dtype=merge.compute_dtype)
    return PeftModel.from_pretrained(base, str(folder)).eval()
