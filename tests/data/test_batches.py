"""The tensors of a step hold every document once, its own positions and no label of another document."""

from itertools import islice

import pytest
import torch
from datasets import Dataset

from goat_ds.data.batches import batches, eval_batches, micro_batch_of
from goat_ds.data.packing import pack_dataset
from goat_ds.data.sampler import BatchPlan
from goat_ds.data.tokens import FEATURES, IGNORE

NUM_RECORDS = 23


def document(row):
    """Tokens that tell their record and place; the last third is the answer."""
    ids = [100 * (row + 1) + place for place in range(3 + row % 5)]
    start = 2 * len(ids) // 3
    return ids, [IGNORE] * start + ids[start:]


@pytest.fixture
def dataset():
    documents = [document(row) for row in range(NUM_RECORDS)]
    columns = {
        "input_ids": [ids for ids, _ in documents],
        "labels": [labels for _, labels in documents],
        "num_tokens": [len(ids) for ids, _ in documents],
        "num_labels": [len(labels) - labels.count(IGNORE) for _, labels in documents],
        "origin": [f"line {row}" for row in range(NUM_RECORDS)],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def plan_of(dataset, *, world_size=2, micro_batch_size=2, grad_accum_steps=2, packing=True):
    packs, num_labels, _ = pack_dataset(dataset, max_length=16, packing=packing)
    return BatchPlan(
        packs=packs,
        num_labels=num_labels,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * grad_accum_steps * world_size,
        world_size=world_size,
        seed=0,
    )


def all_ranks(dataset, plan, step=0):
    ranks = [batches(dataset, plan, world_rank=rank) for rank in range(plan.world_size)]
    return [dict(rank.from_step(step, until=plan.steps_per_epoch)) for rank in ranks]


def documents_of(micro_batch):
    starts = (micro_batch.position_ids[0] == 0).nonzero()[:, 0].tolist()
    return [part.tolist() for part in torch.tensor_split(micro_batch.input_ids[0], starts[1:])]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_shows_every_document_whole_and_once(dataset, packing):
    plan = plan_of(dataset, packing=packing)
    micro_batches = [
        micro for rank in all_ranks(dataset, plan) for step in rank.values() for micro in step.micro_batches
    ]
    shown = [ids for micro in micro_batches if not micro.is_filler for ids in documents_of(micro)]
    assert sorted(shown) == [document(row)[0] for row in range(NUM_RECORDS)]
    assert sum(len(documents_of(micro)) for micro in micro_batches if not micro.is_filler) == NUM_RECORDS


def test_a_label_is_the_next_token_of_the_same_document(dataset):
    rows = [4, 0, 7]
    micro_batch = micro_batch_of(dataset.with_format("numpy"), rows)
    expected = [label for row in rows for label in [*document(row)[1][1:], IGNORE]]
    assert micro_batch.labels.tolist() == [expected]
    assert micro_batch.position_ids.tolist() == [[place for row in rows for place in range(len(document(row)[0]))]]
    assert micro_batch.label_index.tolist() == [place for place, label in enumerate(expected) if label != IGNORE]
    assert micro_batch.num_tokens == micro_batch.input_ids.numel()
    assert {tensor.dtype for tensor in micro_batch if isinstance(tensor, torch.Tensor)} == {torch.int64}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_label_tokens_of_all_ranks_are_the_count_that_each_rank_knows(dataset, world_size):
    plan = plan_of(dataset, world_size=world_size)
    ranks = all_ranks(dataset, plan)
    for step in range(plan.steps_per_epoch):
        seen = sum(micro.label_index.numel() for rank in ranks for micro in rank[step].micro_batches)
        assert {rank[step].num_label_tokens for rank in ranks} == {seen}


def test_the_same_documents_are_in_the_same_step_on_any_number_of_ranks(dataset):
    def steps(**layout):
        ranks = all_ranks(dataset, plan_of(dataset, **layout))
        return [sorted(row for rank in ranks for row in rank[step].record_ids) for step in ranks[0]]

    alone = steps(world_size=1, micro_batch_size=1, grad_accum_steps=4)
    assert alone == steps(world_size=4, micro_batch_size=1, grad_accum_steps=1)
    assert alone == steps(world_size=2, micro_batch_size=2, grad_accum_steps=1)


def test_a_rank_without_a_pack_runs_fillers_that_count_nothing(dataset):
    plan = plan_of(dataset.select(range(2)), world_size=8, grad_accum_steps=3)
    step = dict(batches(dataset, plan, world_rank=7).from_step(0, until=1))[0]
    assert [micro.is_filler for micro in step.micro_batches] == [True] * 3
    assert step.num_tokens == 0 and step.record_ids == [] and step.num_label_tokens > 0
    filler = step.micro_batches[0]
    assert filler.label_index.numel() == 0 and (filler.labels == IGNORE).all()
    assert filler.input_ids.shape == filler.position_ids.shape == filler.labels.shape


def test_a_resumed_run_sees_the_same_batches(dataset):
    plan = plan_of(dataset, micro_batch_size=1, grad_accum_steps=1)
    whole = list(islice(batches(dataset, plan, world_rank=1).from_step(0), 12))
    resumed = list(islice(batches(dataset, plan, world_rank=1).from_step(5), 7))
    assert [step for step, _ in resumed] == list(range(5, 12))
    assert [batch.record_ids for _, batch in resumed] == [batch.record_ids for _, batch in whole[5:]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_document_once_with_as_many_micro_batches_on_each_rank(dataset, world_size):
    packs = plan_of(dataset).packs
    ranks = [
        list(eval_batches(dataset, packs, micro_batch_size=2, world_rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    shown = [ids for rank in ranks for micro in rank if not micro.is_filler for ids in documents_of(micro)]
    assert sorted(shown) == [document(row)[0] for row in range(NUM_RECORDS)]
    assert len({len(rank) for rank in ranks}) == 1


def test_a_micro_batch_moves_with_all_its_tensors(dataset):
    moved = micro_batch_of(dataset.with_format("numpy"), [0]).to("meta")
    assert all(value.device.type == "meta" for value in moved if isinstance(value, torch.Tensor))
