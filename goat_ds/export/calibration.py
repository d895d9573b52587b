"""The tokens a dense export is fitted on and judged by: a sample kept with the checkpoint, or data that is named."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from goat_ds.base.packing_probe import row_problem
from goat_ds.data import MicroBatch, eval_batches, load_tokenizer, pack_dataset, prepare
from goat_ds.data.sample import SAMPLE_FEATURES, SAMPLE_NAME, Sample, load_sample, take_sample
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError
from goat_ds.export.adapter_file import Adapter
from goat_ds.export.stored_base import StoredBase

DEFAULT_LENGTH = 1_024
"""Tokens of the longest record, where no run says so."""


class TokenSource(NamedTuple):
    """Documents, and where they come from."""

    sample: Sample
    calibration_name: str
    heldout_name: str


class Packs(NamedTuple):
    """Documents laid out in rows."""

    dataset: Dataset
    packs: Sequence[Sequence[int]]
    num_tokens: int
    num_labels: int

    def micro_batches(self, *, shared: bool) -> Iterator[MicroBatch]:
        """Yield rows one at a time: all of them, or this rank's share, without fillers."""
        packs = ranks.share_of(self.packs) if shared else self.packs
        yield from eval_batches(self.dataset, packs, micro_batch_size=1, world_rank=0, world_size=1)


class NamedData(NamedTuple):
    """Data that a user names: files, folders or hub names, in any training format."""

    sources: Sequence[str]
    split: str
    """Of hub data sets and folders that have several."""


def find_tokens(
    adapter: Adapter,
    base: StoredBase,
    *,
    calibration: NamedData,
    heldout: NamedData,
    num_tokens: int,
    num_heldout_labels: int,
    max_length: int | None,
) -> TokenSource | None:
    """Read the sample beside the checkpoint, or tokenise the data that is named, as in training.

    None where an adapter that is dense already has nothing to be compared on.

    Args:
        adapter: In its checkpoint folder.
        base: Whose tokenizer is used where the adapter has none.
        calibration: What to fit on; without sources, the sample.
        heldout: What to compare on; without sources, the sample's, or a part of ``calibration`` set aside.
        num_tokens: Of calibration, up to the end of a document.
        num_heldout_labels: Label tokens to compare on, likewise.
        max_length: Tokens of the longest record that is named; None: those of the run where they are known, else 1,024.

    Raises:
        ConfigError: there is no sample and nothing is named, or what is named cannot be read.
        ExportError: the sample is damaged.
    """
    kept = adapter.path.parent / SAMPLE_NAME
    wants_sample = not calibration.sources and (adapter.is_routed or not heldout.sources)
    found = load_sample(kept) if wants_sample and kept.is_file() else None
    if adapter.is_routed and not calibration.sources and found is None:
        raise ConfigError(
            f"calibration is not given, and {adapter.path.parent} keeps no {SAMPLE_NAME}; name training data with "
            "--calibration FILE"
        )
    if found is None and not calibration.sources and not heldout.sources:
        return None
    length = max_length or (found.max_length if found else _default_length(base))
    train, held = (_tokenised(data, adapter, base, length) for data in (calibration, heldout))
    if found:
        train, held = found.calibration, held or found.heldout
    sample = take_sample(
        # A dense adapter fits nothing, so what it is compared on is all there is.
        train or held,
        held,
        num_tokens=num_tokens,
        num_heldout_labels=num_heldout_labels,
        max_length=max(length, found.max_length) if found else length,
        seed=0,
    )
    calibration_name = ", ".join(calibration.sources) or f"the checkpoint's {SAMPLE_NAME}"
    held_name = f"documents held out in the checkpoint's {SAMPLE_NAME}" if found else f"a part of {calibration_name}"
    return TokenSource(sample, calibration_name, ", ".join(heldout.sources) or held_name)


def packs_of(dataset: Dataset, base: StoredBase, *, max_length: int) -> Packs:
    """Lay documents out in rows without padding: several to a row, where the architecture keeps them apart."""
    packing = row_problem(base.base) is None
    packed = pack_dataset(dataset, max_length=max_length, packing=packing)
    num_tokens = sum(len(ids) for ids in dataset["input_ids"])
    return Packs(dataset, packed.packs, num_tokens, sum(packed.num_labels))


def _num_positions(base: StoredBase) -> int | None:
    return base.base.num_positions


def _default_length(base: StoredBase) -> int:
    return min(DEFAULT_LENGTH, _num_positions(base) or DEFAULT_LENGTH)


def _tokenised(data: NamedData, adapter: Adapter, base: StoredBase, max_length: int) -> Dataset | None:
    if not data.sources:
        return None
    positions = _num_positions(base)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"max_length ({max_length}) is above the base's max_position_embeddings ({positions}); lower it"
        )
    # The run may have added tokens or a chat template to the base's tokenizer.
    own = (adapter.path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter.path if own else base.path))
    with tempfile.TemporaryDirectory() as cache:
        made = prepare(data.sources, tokenizer, max_length=max_length, cache_dir=Path(cache), split=data.split).dataset
        return Dataset.from_dict(made.select_columns(list(SAMPLE_FEATURES))[:], features=SAMPLE_FEATURES)
