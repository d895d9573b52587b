"""Every record is in one pack, no pack is too long, and hardly a position is empty."""

import numpy as np
import pytest
from datasets import Dataset

from goat_ds.data.packing import pack, pack_dataset, report_on

DISTRIBUTIONS = {
    "conversations": lambda random: random.lognormal(4.5, 0.8, 3000),
    "multiple choice": lambda random: 100 + random.gamma(2, 20, 3000),
    "word problems": lambda random: random.normal(92, 12, 3000),
    "mixed": lambda random: np.concatenate([random.normal(60, 10, 2000), random.lognormal(5, 0.5, 1000)]),
}


def lengths_of(name, max_length):
    return np.clip(DISTRIBUTIONS[name](np.random.default_rng(0)), 1, max_length).astype(np.int64)


@pytest.mark.parametrize("max_length", [512, 1024])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_record_is_in_one_pack_and_95_percent_of_the_positions_are_filled(name, max_length):
    lengths = lengths_of(name, max_length)
    packs = pack(lengths, max_length=max_length)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert max(lengths[rows].sum() for rows in packs) <= max_length
    assert report_on(packs, lengths, max_length=max_length).fill >= 0.95


def test_the_same_lengths_give_the_same_packs():
    lengths = lengths_of("mixed", 512)
    assert pack(lengths, max_length=512) == pack(lengths.copy(), max_length=512)


def test_records_that_fit_exactly_are_put_together():
    packs = pack(np.array([3, 7, 5, 5, 10, 4, 6]), max_length=10)
    assert sorted(map(sorted, packs)) == [[0, 1], [2, 3], [4], [5, 6]]


def test_a_hole_that_the_longest_leave_is_closed_with_shorter_ones():
    # The longest first would be 6 + 5 of 12, for ever one short.
    assert sorted(map(len, pack(np.array([6, 5, 3, 3, 4, 3]), max_length=12))) == [3, 3]


def test_records_that_cannot_be_paired_stay_alone():
    assert pack(np.array([6, 6, 6]), max_length=10) == [[0], [1], [2]]
    assert pack(np.array([], dtype=np.int64), max_length=10) == []


def test_half_a_million_records_take_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 500_000), 1, 2048).astype(np.int64)
    packs = pack(lengths, max_length=2048)
    assert sum(map(len, packs)) == 500_000


@pytest.mark.parametrize("packing", [True, False])
def test_the_packs_of_a_data_set_know_their_labels(packing):
    dataset = Dataset.from_dict({"num_tokens": [4, 6, 5, 5], "num_labels": [1, 2, 3, 4]})
    packs, num_labels, report = pack_dataset(dataset, max_length=10, packing=packing)
    assert num_labels == [sum(row + 1 for row in rows) for rows in packs]
    assert len(packs) == report.num_packs == (2 if packing else 4)
    assert report.fill == (1.0 if packing else 0.5)
    assert str(report).startswith("4 records in ")
