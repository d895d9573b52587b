"""The global batches are the same for any number of ranks, and hold every pack once an epoch."""

import pytest

from goat_ds.data.sampler import BatchPlan, deal

LAYOUTS = [(4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8), (1, 2, 4)]  # micro-batch size, accumulation, ranks: 8 packs


def plan(num_packs=53, layout=(2, 2, 2), seed=0):
    micro_batch_size, grad_accum_steps, world_size = layout
    return BatchPlan(
        packs=[[row] for row in range(num_packs)],
        num_labels=list(range(1, num_packs + 1)),
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * grad_accum_steps * world_size,
        world_size=world_size,
        seed=seed,
    )


def shares(batch_plan, batch):
    return [batch_plan.share_of(batch, world_rank=rank) for rank in range(batch_plan.world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_any_number_of_ranks_shares_the_same_global_batches(world_size, micro_batch_size):
    expected = list(plan().from_step(0, until=14))
    packs = {"packs": [[row] for row in range(53)], "num_labels": list(range(1, 54))}
    sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": 8, "world_size": world_size}
    batch_plan = BatchPlan(**packs, **sizes, seed=0)
    assert list(batch_plan.from_step(0, until=14)) == expected
    for batch in expected:
        dealt = shares(batch_plan, batch)
        assert sorted(pack for share in dealt for micro in share for pack in micro) == sorted(batch.pack_ids)
        assert all(len(share) == batch_plan.grad_accum_steps for share in dealt)
        assert all(len(micro) <= micro_batch_size for share in dealt for micro in share)


def test_an_epoch_holds_every_pack_exactly_once():
    batch_plan = plan()
    for epoch in range(3):
        first = epoch * batch_plan.steps_per_epoch
        batches = list(batch_plan.from_step(first, until=first + batch_plan.steps_per_epoch))
        assert sorted(pack for batch in batches for pack in batch.pack_ids) == list(range(53))
        assert {batch.epoch for batch in batches} == {epoch}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_global_batches_depend_on_the_product_alone(layout):
    assert list(plan(layout=layout).from_step(0, until=20)) == list(plan(layout=LAYOUTS[0]).from_step(0, until=20))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_share_each_global_batch_without_rest(layout):
    batch_plan = plan(layout=layout)
    for batch in batch_plan.from_step(0, until=14):
        dealt = shares(batch_plan, batch)
        assert sorted(pack for share in dealt for micro in share for pack in micro) == sorted(batch.pack_ids)
        assert all(len(share) == batch_plan.grad_accum_steps for share in dealt)
        sizes = [sum(map(len, share)) for share in dealt]
        assert max(sizes) - min(sizes) <= 1


def test_each_rank_knows_the_label_tokens_of_the_whole_global_batch():
    batch_plan = plan()
    for batch in batch_plan.from_step(0, until=10):
        assert batch.num_label_tokens == sum(pack + 1 for pack in batch.pack_ids)


def test_starting_later_gives_the_rest_of_the_same_run():
    whole = list(plan().from_step(0, until=30))
    for start in (0, 1, 6, 7, 8, 20, 29):
        assert list(plan().from_step(start, until=30)) == whole[start:]
    assert list(plan().from_step(30, until=30)) == []


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(plan(seed=seed).epoch_order(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_fewer_packs_than_a_global_batch_are_one_short_step_with_the_empty_micro_batches_last():
    batch_plan = plan(num_packs=3, layout=(1, 2, 4))
    (batch,) = batch_plan.from_step(0, until=1)
    assert batch_plan.steps_per_epoch == 1
    assert [[len(micro) for micro in share] for share in shares(batch_plan, batch)] == [[1, 0], [1, 0], [1, 0], [0, 0]]


def test_dealing_goes_round_the_ranks():
    dealt = [deal(range(7), micro_batch_size=2, num_micro_batches=2, world_rank=r, world_size=2) for r in (0, 1)]
    assert dealt == [[[0, 2], [4, 6]], [[1, 3], [5]]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_packs", [1, 3, 8, 13])
def test_each_rank_knows_how_many_micro_batches_of_all_ranks_hold_a_pack(num_packs, layout):
    batch_plan = plan(num_packs, layout=layout)
    for batch in batch_plan.from_step(0, until=3):
        dealt = [micro for share in shares(batch_plan, batch) for micro in share]
        assert batch_plan.num_micro_batches(batch) == sum(1 for micro in dealt if micro)
