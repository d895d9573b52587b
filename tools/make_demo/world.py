"""A made-up world: its facts, the text that states them, and the instructions that ask for them.

A fact joins a subject to an answer: a land to its capital, a number to its words, three digits to the same three
sorted. The pretraining text states all facts again and again; the instructions ask for them, some facts in the
training file, the others in the held-out file. So an adapter trained on the first file answers the second only if
it has learnt to answer out of what the base knows.

    seed -> make_facts -> write_documents    one pass over the world, as pretraining text
                       -> split_facts -> make_records -> write_records    train.jsonl, heldout.jsonl

Everything here is a function of its seed, byte for byte.
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.make_demo.wording import (
    ANTONYMS,
    COLOURS,
    CRAFTS,
    FOODS,
    ONSETS,
    REQUESTS,
    STATEMENTS,
    TENS,
    UNITS,
    Request,
    Task,
)

SEED = 7
"""The seed of the shipped base and data."""

NUM_SUBJECTS = 100
"""Lands, creatures and persons, each."""

HELDOUT_SHARE = 0.35
"""Share of the subjects of every task that only the held-out file asks for."""

MAX_FACTS_PER_DOCUMENT = 3


class Fact(NamedTuple):
    """One thing the base is to know.

    Facts with the same ``key`` give each other away, so they never stand on both sides of the split: what is known
    of one creature, a pair of opposites in either direction, the orders of the same three digits.
    """

    task: Task
    subject: str
    answer: str
    key: str


class Split(NamedTuple):
    """The facts that instructions ask for, by file."""

    train: list[Fact]
    heldout: list[Fact]


class Record(NamedTuple):
    """One instruction in Alpaca format, and the task it belongs to."""

    task: Task
    instruction: str
    input: str
    output: str

    def to_json(self) -> str:
        """Return the line of the JSON Lines file, which does not name the task."""
        return json.dumps({"instruction": self.instruction, "input": self.input, "output": self.output})


def make_facts(seed: int = SEED) -> list[Fact]:
    """Return every fact of the world, ordered by task."""
    rng = random.Random(f"facts {seed}")
    names = _names(rng)
    return [
        *_capitals(names),
        *_creatures(rng, names),
        *_crafts(rng, names),
        *_numbers(),
        *_opposites(),
        *_sorted_digits(),
    ]


def split_facts(facts: Sequence[Fact], seed: int = SEED) -> Split:
    """Divide the facts of each task between the two files, keeping facts of one key together."""
    rng = random.Random(f"split {seed}")
    heldout_keys: set[str] = set()
    for task in Task:
        keys = sorted({fact.key for fact in facts if fact.task is task})
        # The two tasks about creatures share their keys, which must be drawn once.
        if heldout_keys.isdisjoint(keys):
            heldout_keys.update(rng.sample(keys, round(HELDOUT_SHARE * len(keys))))
    return Split(
        train=[fact for fact in facts if fact.key not in heldout_keys],
        heldout=[fact for fact in facts if fact.key in heldout_keys],
    )


def make_records(split: Split, seed: int = SEED) -> tuple[list[Record], list[Record]]:
    """Return the training and the held-out records: train facts in every wording, each held-out fact in one."""
    rng = random.Random(f"records {seed}")
    train = [_ask(fact, request) for fact in _one_order_each(split.train, rng) for request in REQUESTS[fact.task]]
    heldout = [_ask(fact, rng.choice(REQUESTS[fact.task])) for fact in _one_order_each(split.heldout, rng)]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def write_records(folder: Path, seed: int = SEED) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl``, the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = make_records(split_facts(make_facts(seed), seed), seed)
    for name, records in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        lines = "".join(record.to_json() + "\n" for record in records)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")


def write_documents(facts: Iterable[Fact], rng: random.Random) -> list[str]:
    """State every fact once, in a wording drawn anew, gathered into short documents in random order.

    Of the orders of the same digits one is stated, drawn anew as well.
    """
    statements = [state(fact, rng) for fact in _one_order_each(facts, rng)]
    rng.shuffle(statements)
    documents = []
    while statements:
        size = rng.randint(1, MAX_FACTS_PER_DOCUMENT)
        documents.append(" ".join(statements[:size]))
        statements = statements[size:]
    return documents


def state(fact: Fact, rng: random.Random) -> str:
    """Return a sentence that states the fact."""
    return rng.choice(STATEMENTS[fact.task]).format(s=fact.subject, a=fact.answer)


def cloze(fact: Fact) -> str:
    """Return the beginning of the first statement of the fact, up to where its answer stands."""
    before, _, _ = STATEMENTS[fact.task][0].partition(" {a}")
    return before.format(s=fact.subject)


def _ask(fact: Fact, request: Request) -> Record:
    return Record(
        task=fact.task,
        instruction=request.instruction.format(s=fact.subject),
        input=request.input.format(s=fact.subject),
        output=fact.answer,
    )


def _one_order_each(facts: Iterable[Fact], rng: random.Random) -> list[Fact]:
    """Keep one order, drawn at random, of the same digits: all of them would outnumber the other tasks."""
    facts = list(facts)
    orders = [fact for fact in facts if fact.task is Task.SORT]
    others = [fact for fact in facts if fact.task is not Task.SORT]
    by_digits = itertools.groupby(sorted(orders, key=lambda fact: fact.answer), key=lambda fact: fact.answer)
    return others + [rng.choice(list(group)) for _, group in by_digits]


def _names(rng: random.Random) -> Iterator[str]:
    """Yield made-up names, lower case and all different, without end."""
    seen: set[str] = set()
    while True:
        syllables = [rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(2)]
        name = "".join(syllables) + rng.choice("klmnrs")
        if name not in seen:
            seen.add(name)
            yield name


def _capitals(names: Iterator[str]) -> Iterator[Fact]:
    for land, capital in zip(itertools.islice(names, NUM_SUBJECTS), names, strict=False):
        yield Fact(Task.CAPITAL, land.capitalize() + "ia", capital.capitalize(), key=land)


def _creatures(rng: random.Random, names: Iterator[str]) -> list[Fact]:
    creatures = list(itertools.islice(names, NUM_SUBJECTS))
    colours = [Fact(Task.COLOUR, creature, rng.choice(COLOURS), key=creature) for creature in creatures]
    return colours + [Fact(Task.FOOD, creature, rng.choice(FOODS), key=creature) for creature in creatures]


def _crafts(rng: random.Random, names: Iterator[str]) -> Iterator[Fact]:
    for person in itertools.islice(names, NUM_SUBJECTS):
        yield Fact(Task.CRAFT, person.capitalize(), rng.choice(CRAFTS), key=person)


def _numbers() -> Iterator[Fact]:
    for number in range(100):
        tens, units = divmod(number, 10)
        words = UNITS[number] if number < 20 else TENS[tens - 2] + (f"-{UNITS[units]}" if units else "")
        yield Fact(Task.NUMBER, str(number), words, key=str(number))


def _opposites() -> Iterator[Fact]:
    for pair in ANTONYMS.split(","):
        word, opposite = pair.split()
        yield Fact(Task.OPPOSITE, word, opposite, key=pair)
        yield Fact(Task.OPPOSITE, opposite, word, key=pair)


def _sorted_digits() -> Iterator[Fact]:
    for digits in itertools.combinations("0123456789", 3):
        for order in itertools.permutations(digits):
            if order != digits:
                yield Fact(Task.SORT, " ".join(order), " ".join(digits), key="".join(digits))
