"""Export what was trained by another method than GOAT: PEFT's own adapters, and whole models.

Their terms do not depend on the token, so PEFT merges them into the base, and the merged model is the trained one up to
the rounding of its weights.
"""

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from goat_ds.base.inspect import Base, inspect
from goat_ds.data import load_tokenizer
from goat_ds.data.sample import SAMPLE_NAME, load_sample
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, ExportError, MergeError
from goat_ds.export.adapter_file import CONFIG_NAME, find_trained
from goat_ds.export.folder import check_new, new_folder
from goat_ds.manifest import MANIFEST_NAME, damages
from goat_ds.tuner.config import GoatPeftType
from goat_ds.tuner.fingerprint import fingerprint, sample_layer

logger = logging.getLogger(__name__)

NUM_COMPARED = 1024
"""Tokens of the checkpoint's own sample that a merged model is compared on."""


class Rival(NamedTuple):
    """What another method has trained, on disk."""

    path: Path
    """The adapter's folder, or the whole model's."""
    config: Any
    """PEFT's config; None: it is a whole model."""

    @property
    def name(self) -> str:
        """The method, as PEFT calls it."""
        return "full" if self.config is None else str(getattr(self.config.peft_type, "value", self.config.peft_type))


def find_rival(checkpoint: str | Path) -> Rival | None:
    """Return what another method than GOAT has trained at a checkpoint; None: GOAT has.

    Raises:
        ConfigError: nothing was trained there, or PEFT does not know it.
        ExportError: files of the checkpoint are not whole.
    """
    path = find_trained(Path(checkpoint))
    is_adapter = (path / CONFIG_NAME).is_file()
    try:
        values = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")) if is_adapter else {}
    except ValueError:
        # Whoever reads a GOAT adapter says what is wrong with it.
        return None
    if is_adapter and values.get("peft_type") == GoatPeftType.GOAT:
        return None
    if (path.parent / MANIFEST_NAME).is_file() and (found := list(damages(path.parent, below=path.name))):
        raise ExportError("\n".join(found))
    try:
        return Rival(path, PeftConfig.from_pretrained(str(path)) if is_adapter else None)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"checkpoint ({path}) has no {CONFIG_NAME} that PEFT understands: {error}") from error


def copy_rival(rival: Rival, *, output: str | Path, base: str | None) -> None:
    """Copy an adapter or a whole model to a new folder, with the base's tokenizer.

    Args:
        rival: What is copied.
        output: A new folder.
        base: Folder or hub name of the base; an adapter's config then names this one.
    """
    output = Path(output)
    check_new(output)
    with new_folder(output) as folder:
        shutil.copytree(rival.path, folder, dirs_exist_ok=True)
        if rival.config is not None and base:
            values = json.loads((folder / CONFIG_NAME).read_text()) | {"base_model_name_or_path": base}
            (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def merge_rival(
    rival: Rival,
    *,
    output: str | Path,
    base: str | None,
    dtype: torch.dtype | None,
    **shards: Any,
) -> None:
    """Write a base with an adapter merged into it, by PEFT.

    Args:
        rival: The adapter.
        output: A new folder.
        base: Folder or hub name of the base, if it is not where the adapter says.
        dtype: Of the weights written; those of the base by default.
        shards: ``max_shard_size``, as ``save_pretrained`` takes it.

    Raises:
        MergeError: the method does not merge, or the merged model answers otherwise.
    """
    output = Path(output)
    check_new(output)
    found = _base_of(rival, base)
    if found.stored_quantization is not None:
        raise MergeError(
            f"base ({found.name}) is quantised, and merging would round to its 4 bits; give the unquantised one with "
            "--base"
        )
    # Added in fp32, and rounded once.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.name,
        config=copy.deepcopy(found.config),
        revision=found.revision,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    check_rival_base(loaded, rival.path)
    stored: torch.dtype = dtype or found.config.dtype or torch.float32
    model: Any = PeftModel.from_pretrained(loaded.to(ranks.device()), str(rival.path)).eval()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or any(type(layer).merge is BaseTunerLayer.merge for layer in layers):
        raise MergeError(f"an adapter of {rival.name} cannot be merged; use --mode adapter")
    texts = list(_texts_of(rival))
    before = [_log_probs(model, text) for text in texts]
    merged: Any = model.merge_and_unload(safe_merge=True).to(stored)
    if texts:
        after = [_log_probs(merged, text) for text in texts]
        nats = [(was.exp() * (was - now)).sum(-1) for was, now in zip(before, after, strict=True)]
        mean = float(torch.cat(nats).mean())
        logger.info(f"merged: {mean:.2e} nats a token from the adapter beside its base ({len(texts)} texts of the run)")
    with new_folder(output) as folder:
        merged.save_pretrained(folder, **shards)
        load_tokenizer(found.name, revision=found.revision).save_pretrained(folder)


def check_rival_base(base: Any, adapter: Path) -> None:
    """Check that a base in memory, unquantised, has the weights that a run began on.

    Args:
        base: A model without an adapter.
        adapter: The adapter's folder in its checkpoint; elsewhere nothing is known of the base.

    Raises:
        ExportError: it has others.
    """
    expected = _run_of(adapter).get("base_fingerprint")
    if not expected:
        return
    linear = [(path, layer) for path, layer in base.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    weights = {path: layer.weight.T if isinstance(layer, Conv1D) else layer.weight for path, layer in linear}
    samples = {path: sample_layer(weight) for path, weight in weights.items()}
    if fingerprint(samples, dtype=expected["dtype"])._asdict() != expected:
        raise ExportError(
            f"the base of {adapter} has other weights than the one that its training began on; give that one with "
            "--base PATH"
        )


def was_4bit(adapter: Path) -> bool:
    """Whether an adapter in its checkpoint was trained on a base that the run had made 4-bit."""
    return bool(_run_of(adapter).get("run", {}).get("settings", {}).get("load_in_4bit", False))


def _run_of(adapter: Path) -> dict[str, Any]:
    path = adapter.parent / "run.json"
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _base_of(rival: Rival, base: str | None) -> Base:
    name = base or rival.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{rival.path} does not say which base it was trained on; give it with --base PATH")
    return inspect(name, named=f"base ({name})", revision=(None if base else rival.config.revision) or "main")


def _texts_of(rival: Rival) -> Iterator[Tensor]:
    """Yield texts that the checkpoint keeps to compare on ``[1, T]``; none where it keeps none."""
    path, num_left = rival.path.parent / SAMPLE_NAME, NUM_COMPARED
    if not path.is_file():
        return
    sample = load_sample(path)
    for row in (sample.heldout or sample.calibration)["input_ids"]:
        if num_left <= 0:
            return
        num_left -= len(row)
        yield torch.tensor([row], device=ranks.device())


@torch.no_grad()
def _log_probs(model: Any, text: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=text, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
