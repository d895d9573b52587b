"""A sample of the data: whole documents, the same for the same seed, none of them on both sides, safe on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from goat_ds.data import eval_batches, pack_dataset
from goat_ds.data.sample import Sample, load_sample, save_sample, take_sample
from goat_ds.data.tokens import FEATURES, IGNORE
from goat_ds.errors import ExportError


def documents(*, first: int = 0, count: int = 60) -> Dataset:
    """Documents of 4 to 8 tokens that tell which document they are of; the last two are the answer."""
    ids = [[1000 * (row + 1) + place for place in range(4 + row % 5)] for row in range(first, first + count)]
    columns = {
        "input_ids": ids,
        "labels": [[IGNORE] * (len(row) - 2) + row[-2:] for row in ids],
        "num_tokens": [len(row) for row in ids],
        "num_labels": [2] * count,
        "origin": [f"line {row}" for row in range(count)],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def take(train: Dataset, heldout: Dataset | None = None, **changed: Any) -> Sample:
    settings = {"num_tokens": 100, "num_heldout_labels": 7, "max_length": 16, "seed": 3} | changed
    return take_sample(train, heldout, **settings)


def texts(dataset: Dataset) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in dataset["input_ids"]]


def test_documents_are_whole_and_the_one_that_reaches_the_number_is_the_last() -> None:
    train = documents()
    sample = take(train)
    assert set(texts(sample.calibration)) < set(texts(train))
    tokens = sample.calibration["num_tokens"]
    assert sum(tokens) >= 100 > sum(tokens[:-1])
    assert sample.heldout["num_labels"] == [2] * 4


def test_documents_set_aside_are_not_calibrated_on() -> None:
    sample = take(documents(), num_tokens=10**6)
    assert not set(texts(sample.calibration)) & set(texts(sample.heldout))
    assert sorted(texts(sample.calibration) + texts(sample.heldout)) == texts(documents())


def test_heldout_documents_come_from_the_heldout_data_where_there_are_some() -> None:
    heldout = documents(first=100)
    sample = take(documents(), heldout, num_tokens=10**6)
    assert set(texts(sample.heldout)) < set(texts(heldout)) and len(sample.heldout) == 4
    assert sorted(texts(sample.calibration)) == texts(documents())


@pytest.mark.parametrize(("count", "aside"), [(1, 0), (2, 1), (9, 1), (10, 2)])
def test_little_data_leaves_a_document_to_judge_by_and_calibrates_on_the_rest(count: int, aside: int) -> None:
    sample = take(documents(count=count), num_tokens=10**6, num_heldout_labels=10**6)
    assert (len(sample.calibration), len(sample.heldout)) == (count - aside, aside)


def test_the_seed_decides_which_documents_are_taken() -> None:
    first, again, other = (take(documents(), seed=seed) for seed in (3, 3, 4))
    assert texts(first.calibration) == texts(again.calibration) and texts(first.heldout) == texts(again.heldout)
    assert texts(first.calibration) != texts(other.calibration) and texts(first.heldout) != texts(other.heldout)


@pytest.mark.parametrize("count", [1, 60])
def test_a_sample_comes_back_from_disk_as_it_was_and_makes_the_same_file(tmp_path: Path, count: int) -> None:
    sample = take(documents(count=count))
    save_sample(sample, tmp_path / "a")
    again = load_sample(tmp_path / "a")
    assert again.max_length == 16
    for before, after in zip(sample[:2], again[:2], strict=True):
        assert before.features == after.features and before[:] == after[:]
    save_sample(again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {array.dtype for array in load_file(tmp_path / "a").values()} == {np.dtype(np.int32)}


def test_the_file_does_not_say_where_the_documents_came_from(tmp_path: Path) -> None:
    save_sample(take(documents()), tmp_path / "sample")
    assert b"line" not in (tmp_path / "sample").read_bytes()


def test_what_is_loaded_is_packed_and_batched_as_data_is(tmp_path: Path) -> None:
    save_sample(take(documents()), tmp_path / "sample")
    calibration = load_sample(tmp_path / "sample").calibration
    packed = pack_dataset(calibration, max_length=16, packing=True)
    rows = list(eval_batches(calibration, packed.packs, micro_batch_size=1, world_rank=0, world_size=1))
    assert sorted(int(token) for row in rows for token in row.input_ids[0]) == sorted(sum(texts(calibration), ()))
    assert sum(packed.num_labels) == sum(row.label_index.numel() for row in rows) == 2 * len(calibration)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "cannot be read: "),
        (flip, "is damaged, its checksum does not fit"),
        (Path.unlink, "cannot be read: "),
        (lambda path: save_file({"weight": np.zeros(3)}, path), "is not one, it has no 'goat_ds sample 1'"),
    ],
)
def test_a_file_that_is_no_sample_is_named(tmp_path: Path, damage: Any, words: str) -> None:
    path = tmp_path / "calibration.safetensors"
    save_sample(take(documents()), path)
    damage(path)
    with pytest.raises(ExportError, match=rf"sample of the data \(.*calibration.safetensors\) {words}.*; take cal"):
        load_sample(path)
