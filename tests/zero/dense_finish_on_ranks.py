"""Finish densely where every token has the same gates, so that nothing can be lost; started once per rank.

python finish_on_ranks.py OUTPUT FLAGS...        writes what each rank saw as JSON
"""

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from goat_ds.data import batches
from goat_ds.distributed import ranks
from goat_ds.train.build import build, schedule_of
from goat_ds.train.cli import parse
from goat_ds.train.data import batch_plan, load_all_tokens
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.objective import label_loss_sum, objective
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.zero import engine as engines
from goat_ds.zero.dense_finish import finish_densely
from goat_ds.zero.optimizer_state import read_state, write_state

NUM_STEPS = 6


def main() -> None:
    torch.set_num_threads(1)
    output, config = Path(sys.argv[1]), parse(sys.argv[2:])
    join_ranks(config, timeout_minutes=5)
    tokens, _ = load_all_tokens(read_inputs(config))
    engine: Any = build(read_inputs(config), num_steps=NUM_STEPS).engine
    model: Any = engines.peft_model(engine)
    size = config.packs_per_step(ranks.get_world_size())
    plan = batch_plan(config, tokens.packed, global_batch_size=size)
    stream = batches(tokens.dataset, plan, world_rank=ranks.get_rank())
    steps = [batch for _, batch in stream.from_step(0, until=NUM_STEPS)]

    def train_on(first: int, until: int) -> None:
        for step in steps[first:until]:
            (micro_batch,) = step.micro_batches
            loss = objective(engine, model.base_model, micro_batch, step_batch=step, num_micro_batches=2)
            engine.backward(loss.total)
            engine.step()

    @torch.no_grad()
    def losses() -> list[float]:
        return [float(label_loss_sum(engine, step.micro_batches[0])) for step in steps]

    def run() -> None:
        losses()

    train_on(0, 3)
    experts = [item.experts for item in named_experts(model, ADAPTER_NAME)]
    for one in experts:
        state = read_state(engine, one.router)
        # Every token has the gates 1/E.
        zeros = [torch.zeros_like(tensor) for tensor in state[:3]]
        write_state(engine, one.router, type(state)(*zeros, state.num_steps), owner=0)
    before, states = losses(), [(read_state(engine, one.A), read_state(engine, one.B)) for one in experts]
    old = weakref.ref(engine.optimizer)
    done = finish_densely(
        engine,
        run=run,
        counts=lambda: True,
        engine_config=read_inputs(config).engine_config,
        schedule=schedule_of(config, num_steps=NUM_STEPS),
    )
    engine = done.engine
    told: dict[str, Any] = {"before": before, "after": losses(), "old_optimizer_lives": old() is not None}
    told["unexplained"], told["tokens"] = done.unexplained_max, done.num_tokens
    told["b_is_kept"] = all(
        all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y))
            for x, y in zip(read_state(engine, one.B), b, strict=True)
        )
        for one, (_, b) in zip(experts, states, strict=True)
    )
    told["a_is_shared_out"] = max(
        float((read_state(engine, one.A).master * config.num_experts - a.master).abs().max() / a.master.abs().max())
        for one, (a, _) in zip(experts, states, strict=True)
    )
    train_on(3, NUM_STEPS)
    told["trained"] = losses()
    (output / f"told-{ranks.get_rank()}.json").write_text(json.dumps(told))
    engines.destroy(engine)
    ranks.leave()


if __name__ == "__main__":
    main()
