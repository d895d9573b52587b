"""The made-up world and the shipped data: reproducible, balanced, and nothing asked for twice."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from goat_ds.demo import heldout_data, train_data
from tools.make_demo.wording import STATEMENTS, Task
from tools.make_demo.world import make_facts, make_records, split_facts, write_documents, write_records


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_shipped_data_is_what_the_seed_generates(tmp_path: Path) -> None:
    write_records(tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == train_data().read_bytes()
    assert (tmp_path / "heldout.jsonl").read_bytes() == heldout_data().read_bytes()


def test_another_seed_generates_another_world() -> None:
    assert make_facts(1) != make_facts(2)
    assert make_facts(1) == make_facts(1)


@pytest.mark.parametrize("path", [train_data(), heldout_data()], ids=["train", "heldout"])
def test_the_files_are_in_alpaca_format(path: Path) -> None:
    for record in read(path):
        assert set(record) == {"instruction", "input", "output"}
        assert record["instruction"] and record["output"]


def test_no_fact_is_asked_for_in_both_files() -> None:
    split = split_facts(make_facts())
    assert {fact.key for fact in split.train}.isdisjoint(fact.key for fact in split.heldout)
    train, heldout = make_records(split)
    assert {(record.instruction, record.input) for record in train}.isdisjoint(
        (record.instruction, record.input) for record in heldout
    )


def test_digits_to_sort_are_never_in_order_already() -> None:
    for records in make_records(split_facts(make_facts())):
        orders = [record for record in records if record.task is Task.SORT]
        assert all(record.output not in record.instruction + record.input for record in orders)


def test_every_task_has_its_share_of_both_files() -> None:
    for records in make_records(split_facts(make_facts())):
        counts = Counter(record.task for record in records)
        assert set(counts) == set(Task)
        assert min(counts.values()) >= 0.08 * len(records)


def test_some_of_every_task_gives_its_subject_as_the_input() -> None:
    train, _ = make_records(split_facts(make_facts()))
    assert {record.task for record in train if record.input} == set(Task)


def test_the_names_of_the_world_are_all_different() -> None:
    facts = [fact for fact in make_facts() if fact.task is not Task.SORT]
    assert len({(fact.task, fact.subject) for fact in facts}) == len(facts)


def test_a_pass_over_the_world_states_every_fact_it_instructs_about() -> None:
    facts = make_facts()
    text = " ".join(write_documents(facts, random.Random(0)))
    for fact in facts:
        if fact.task is not Task.SORT:
            said = (wording.format(s=fact.subject, a=fact.answer) for wording in STATEMENTS[fact.task])
            assert any(sentence in text for sentence in said), fact


def test_the_pretraining_text_holds_no_instruction() -> None:
    text = " ".join(write_documents(make_facts(), random.Random(0)))
    assert "?" not in text
    for record in itertools.chain(*make_records(split_facts(make_facts()))):
        assert record.instruction not in text
