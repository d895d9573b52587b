"""Keep a sample of a run's data: documents to calibrate an export on, and others, held out, to judge it by.

A routed model leaves as one dense weight only by fitting that weight to what the model does on real documents. The
sample stands in one safetensors file beside the checkpoint, so that an export needs neither the data nor a tokenizer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from goat_ds.data.tokens import FEATURES
from goat_ds.errors import ExportError
from goat_ds.tuner.model import IGNORE

SAMPLE_NAME = "calibration.safetensors"
"""Name of the file in a checkpoint's folder."""
NUM_TOKENS = 131_072
"""Tokens to calibrate on: more than the in features of any layer of LLaMA 3 405B, and 1 MiB on disk."""
NUM_HELDOUT_LABELS = 4_096
"""Label tokens to judge by: enough to know their mean loss to a 64th of the deviation of one token's."""
HELDOUT_SHARE = 5
"""At most one in so many training documents is set aside, so that little data is mostly calibrated on."""
FORMAT = "goat_ds sample 1"
"""Names the entry of the file's metadata; another number, another layout."""

SAMPLE_FEATURES = Features({name: kind for name, kind in FEATURES.items() if name != "origin"})
"""A row of a sample: as in the tokenised data, without the place it came from."""
TENSOR_NAMES = ("input_ids", "labels", "lengths")
WAY_OUT = f"take {SAMPLE_NAME} from a checkpoint that is whole"


class Sample(NamedTuple):
    """Documents of a run, tokenised as it was trained on them."""

    calibration: Dataset
    """Training documents; columns as in ``SAMPLE_FEATURES``."""
    heldout: Dataset
    """Documents that are not in ``calibration``; none where the run had a single document."""
    max_length: int
    """Tokens of the run's longest record and of its packs."""


def take_sample(
    train: Dataset,
    heldout: Dataset | None,
    *,
    num_tokens: int = NUM_TOKENS,
    num_heldout_labels: int = NUM_HELDOUT_LABELS,
    max_length: int,
    seed: int,
) -> Sample:
    """Choose whole documents in a seeded order; the one that reaches a number is the last. Same arguments, same sample.

    Args:
        train: As made by :func:`goat_ds.data.cache.prepare`, at least one document.
        heldout: In the same form; None sets documents of ``train`` aside, and at least one where there are two.
        num_tokens: Tokens of the calibration documents.
        num_heldout_labels: Label tokens of the held-out documents.
        max_length: Tokens of the run's packs.
        seed: Of the order; not negative.
    """
    order = _order(train, seed)
    if heldout is None:
        most_aside = min(len(order) - 1, max(1, len(order) // HELDOUT_SHARE))
        aside = _until(train, order[:most_aside], "num_labels", num_heldout_labels)
        chosen, order = _rows(train, aside), order[len(aside) :]
    else:
        chosen = _rows(heldout, _until(heldout, _order(heldout, seed), "num_labels", num_heldout_labels))
    calibration = _rows(train, _until(train, order, "num_tokens", num_tokens))
    return Sample(calibration, chosen, max_length)


def _order(dataset: Dataset, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(dataset))


def _until(dataset: Dataset, order: np.ndarray, column: str, enough: int) -> np.ndarray:
    """Return the first rows of ``order`` in which a column adds up to ``enough``, or all."""
    counts = dataset.with_format("numpy", columns=[column])
    total = 0
    for num_rows, row in enumerate(order, start=1):
        total += int(counts[int(row)][column])
        if total >= enough:
            return order[:num_rows]
    return order


def _rows(dataset: Dataset, rows: Sequence[int] | np.ndarray) -> Dataset:
    """Return rows of a data set in memory, so that nothing depends on the files it is mapped from."""
    columns = dataset.select_columns(list(SAMPLE_FEATURES))[[int(row) for row in rows]]
    return Dataset.from_dict(columns, features=SAMPLE_FEATURES)


def save_sample(sample: Sample, path: Path) -> None:
    """Write a sample as one safetensors file of int32 tensors: token ids and labels in one row, and their lengths."""
    tensors = {f"calibration.{name}": array for name, array in _arrays(sample.calibration).items()}
    tensors |= {f"heldout.{name}": array for name, array in _arrays(sample.heldout).items()}
    about = {"max_length": sample.max_length, "sha256": _checksum(tensors, sample.max_length)}
    # One entry, because the library writes several in an order that changes from one call to the next.
    save_file(tensors, path, metadata={FORMAT: json.dumps(about)})


def _arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    columns = dataset.with_format(None)[:]
    joined = {name: [token for row in columns[name] for token in row] for name in ("input_ids", "labels")}
    return {name: np.array(values, np.int32) for name, values in (joined | {"lengths": columns["num_tokens"]}).items()}


def _checksum(tensors: Mapping[str, np.ndarray], max_length: int) -> str:
    digest = hashlib.sha256(str(max_length).encode())
    for name in sorted(tensors):
        digest.update(f" {name} {tensors[name].dtype.str} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def load_sample(path: Path) -> Sample:
    """Read what :func:`save_sample` wrote.

    Raises:
        ExportError: the file is not there, is damaged, or is another one.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if FORMAT not in metadata:
            raise ExportError(f"sample of the data ({path}) is not one, it has no {FORMAT!r}; {WAY_OUT}")
        about = json.loads(metadata[FORMAT])
        is_whole = about["sha256"] == _checksum(tensors, about["max_length"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ExportError(f"sample of the data ({path}) cannot be read: {error}; {WAY_OUT}") from error
    if not is_whole:
        raise ExportError(f"sample of the data ({path}) is damaged, its checksum does not fit; {WAY_OUT}")
    return Sample(_dataset(tensors, "calibration"), _dataset(tensors, "heldout"), about["max_length"])


def _dataset(tensors: Mapping[str, np.ndarray], part: str) -> Dataset:
    input_ids, labels, lengths = (tensors[f"{part}.{name}"] for name in TENSOR_NAMES)
    # np.split gives one piece more than it has cuts: nothing, behind the last document.
    ends = np.cumsum(lengths)
    labels_by_document = np.split(labels, ends)[:-1]
    columns = {
        "input_ids": np.split(input_ids, ends)[:-1],
        "labels": labels_by_document,
        "num_tokens": lengths,
        "num_labels": [int((row != IGNORE).sum()) for row in labels_by_document],
    }
    return Dataset.from_dict(columns, features=SAMPLE_FEATURES)
