"""Fill sequences of ``max_length`` positions with whole records, as full as can be.

A pack is a list of rows of the tokenised data set. One pack after the other is filled with the longest records that fit
(which is first-fit decreasing: no long record is left over for the end). Where that leaves a hole, the pack's last
records are exchanged for some that fit best, by a short search: with records of much the same length, as in many
instruction sets, it fills up to six percent more. A longer search would fill the first packs better and the last ones
worse.
"""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from goat_ds.data.sampler import Pack

TOLERANCE = 1 / 64
"""Fraction of a pack that may stay empty without a search."""
ENDING = 8
"""Records of a pack that the search may exchange."""
TRIES = 20
"""Endings that the search looks at."""


class PackReport(NamedTuple):
    """How well the packs are filled."""

    num_records: int
    num_packs: int
    num_tokens: int
    max_length: int
    """Positions of one pack."""

    @property
    def fill(self) -> float:
        """Fraction of all positions that hold a token."""
        return self.num_tokens / (self.num_packs * self.max_length)

    def __str__(self) -> str:
        return (
            f"{self.num_records:,} records in {self.num_packs:,} packs of {self.max_length:,} positions, "
            f"{self.fill:.1%} filled"
        )


class Packed(NamedTuple):
    """Packs with what a :class:`goat_ds.data.sampler.BatchPlan` needs to know of them."""

    packs: list[list[int]]
    num_labels: list[int]
    """Label tokens of each pack."""
    report: PackReport


def pack_dataset(dataset: Dataset, *, max_length: int, packing: bool) -> Packed:
    """Form the packs of a tokenised data set.

    Args:
        dataset: As made by :func:`goat_ds.data.tokens.tokenise`.
        max_length: Positions of a pack, at least the longest record.
        packing: Without it each record is a pack of its own.
    """
    columns = dataset.with_format("numpy", columns=["num_tokens", "num_labels"])[:]
    lengths, label_counts = columns["num_tokens"], columns["num_labels"]
    packs = pack(lengths, max_length=max_length) if packing else [[row] for row in range(len(lengths))]
    num_labels = [int(label_counts[rows].sum()) for rows in packs]
    return Packed(packs, num_labels, report_on(packs, lengths, max_length=max_length))


def pack(lengths: np.ndarray, *, max_length: int) -> list[list[int]]:
    """Place every record in exactly one pack of at most ``max_length`` tokens; deterministic.

    Args:
        lengths: Tokens of each record, each between 1 and ``max_length``.
        max_length: Positions of a pack.

    Returns:
        The row numbers in each pack; a pack's first row is the longest record that was left.
    """
    stock = _Stock(np.asarray(lengths))
    assert not stock.lengths or (stock.lengths[0] > 0 and stock.lengths[-1] <= max_length)
    packs = []
    while stock.lengths:
        chosen = _longest_that_fit(stock, max_length)
        if max_length - sum(chosen) > max_length * TOLERANCE and stock.lengths:
            _improve_ending(stock, chosen, max_length)
        packs.append([stock.rows[length].pop() for length in chosen])
    return packs


class _Stock:
    """The records that are in no pack yet, by length."""

    def __init__(self, all_lengths: np.ndarray) -> None:
        self.rows: defaultdict[int, list[int]] = defaultdict(list)
        for row in range(len(all_lengths) - 1, -1, -1):  # backwards, so that pop() gives the first row
            self.rows[int(all_lengths[row])].append(row)
        self.left = {length: len(rows) for length, rows in self.rows.items()}
        self.lengths = sorted(self.left)
        """The lengths that are left, ascending."""

    def longest(self, room: int) -> int:
        """Return the greatest length that fits in ``room``, or 0."""
        place = bisect_right(self.lengths, room)
        return self.lengths[place - 1] if place else 0

    def take(self, length: int) -> None:
        self.left[length] -= 1
        if not self.left[length]:
            del self.lengths[bisect_left(self.lengths, length)]

    def put_back(self, length: int) -> None:
        if not self.left[length]:
            insort(self.lengths, length)
        self.left[length] += 1


def _longest_that_fit(stock: _Stock, room: int) -> list[int]:
    chosen = []
    while length := stock.longest(room):
        stock.take(length)
        chosen.append(length)
        room -= length
    return chosen


def _improve_ending(stock: _Stock, chosen: list[int], max_length: int) -> None:
    """Exchange the last records of a pack for others of the stock that fill it better, if some are found."""
    start = max(1, len(chosen) - ENDING)
    room = max_length - sum(chosen[:start])
    best = tuple(chosen[start:])
    for length in best:
        stock.put_back(length)
    for ending in islice(_endings(stock, room, ()), TRIES):
        best = max(best, ending, key=sum)
        if room - sum(best) <= max_length * TOLERANCE:
            break
    for length in best:
        stock.take(length)
    chosen[start:] = best


def _endings(stock: _Stock, room: int, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield descending lengths that fit in ``room`` behind ``chosen``, the longest first."""
    length = stock.longest(min((room, *chosen[-1:])))
    while length:
        spent = chosen.count(length) >= stock.left[length]
        if not spent:
            yield (*chosen, length)
            yield from _endings(stock, room - length, (*chosen, length))
        # A shorter record here only helps if it leaves room for one more.
        length = stock.longest(length - 1 if spent else min(length - 1, room - stock.lengths[0]))


def report_on(packs: Sequence[Pack], lengths: np.ndarray, *, max_length: int) -> PackReport:
    """Count how full ``packs`` are."""
    return PackReport(
        num_records=sum(map(len, packs)),
        num_packs=len(packs),
        num_tokens=int(np.asarray(lengths).sum()),
        max_length=max_length,
    )
