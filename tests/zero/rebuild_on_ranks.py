"""Train, and train with another engine from the middle on that was given the state of the first.

    python rebuild_on_ranks.py CASES.json OUTPUT          started once per rank

Writes, by case and rank, the losses of both runs and whether states survived being read and written.
"""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import get_scheduler

from goat_ds.data import batches
from goat_ds.distributed import ranks
from goat_ds.train.build import build
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.data import batch_plan, load_all_tokens
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.objective import objective
from goat_ds.zero import engine as engines
from goat_ds.zero.checkpoint import save_checkpoint
from goat_ds.zero.optimizer_state import TensorState, read_state, write_state

NUM_STEPS, MIDDLE = 6, 3


def main() -> None:
    torch.set_num_threads(1)
    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    parsed = {name: parse(command_line) for name, command_line in cases.items()}
    join_ranks(next(iter(parsed.values())), timeout_minutes=5)
    told = {name: compare(config, output / name) for name, config in parsed.items()}
    (output / f"told-{ranks.get_rank()}.json").write_text(json.dumps(told))
    ranks.leave()


def compare(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Run a case twice."""
    uninterrupted = Run(config)
    told: dict[str, Any] = {"uninterrupted": uninterrupted.train(0, NUM_STEPS)}
    expected = uninterrupted.states()
    engines.destroy(uninterrupted.engine)
    interrupted = Run(config)
    told["interrupted"] = interrupted.train(0, MIDDLE)
    before = interrupted.states()
    told["freed"] = interrupted.change_engine(before)
    told["round_trip"] = equal(before, interrupted.states())
    told["interrupted"] += interrupted.train(MIDDLE, NUM_STEPS)
    told["same_end"] = equal(expected, interrupted.states())
    told["gathered_to_save"] = interrupted.gathered_to_save(folder)
    engines.destroy(interrupted.engine)
    return told


def equal(one: dict[str, TensorState], other: dict[str, TensorState]) -> bool:
    return all(
        state.num_steps == other[name].num_steps
        and all(torch.equal(a, b) for a, b in zip(state[:3], other[name][:3], strict=True))
        for name, state in one.items()
    )


class Run:
    """An engine and its data."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.inputs = config, read_inputs(config)
        self.tokens, _ = load_all_tokens(self.inputs)
        self.engine = build(self.inputs, num_steps=NUM_STEPS).engine
        self.model: Any = engines.peft_model(self.engine)

    def train(self, first: int, until: int) -> list[float]:
        """Return the loss of every step on this rank."""
        losses = []
        size = self.config.packs_per_step(ranks.get_world_size())
        plan = batch_plan(self.config, self.tokens.packed, global_batch_size=size)
        rank, num_ranks = ranks.get_rank(), ranks.get_world_size()
        for _, batch in batches(self.tokens.dataset, plan, world_rank=rank).from_step(first, until=until):
            for micro_batch in batch.micro_batches:
                loss = objective(
                    self.engine, self.model.base_model, micro_batch, step_batch=batch, num_micro_batches=num_ranks
                )
                losses.append(float(loss.lm_sum))
                self.engine.backward(loss.total)
                self.engine.step()
        return losses

    def states(self) -> dict[str, TensorState]:
        """Read the state of everything that trains."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: read_state(self.engine, parameter) for name, parameter in trained.items()}

    def gathered_to_save(self, folder: Path) -> list[str]:
        """Save a checkpoint; name every parameter that ZeRO-3 gathered for it."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        gathered: list[str] = []
        enter = deepspeed.zero.GatheredParameters.__enter__

        def recorded(context: Any) -> Any:
            gathered.extend(names[id(parameter)] for parameter in getattr(context, "params", []))
            return enter(context)

        deepspeed.zero.GatheredParameters.__enter__ = recorded
        try:
            folder.mkdir(exist_ok=True)
            save_checkpoint(self.engine, output_dir=folder, step=NUM_STEPS)
        finally:
            deepspeed.zero.GatheredParameters.__enter__ = enter
        return gathered

    def change_engine(self, states: dict[str, TensorState]) -> bool:
        """Return the model to a new engine and that the states; say whether the old optimizer was freed before."""
        old = weakref.ref(self.engine.optimizer)
        steps = self.engine.lr_scheduler.last_epoch
        engines.destroy(self.engine)
        del self.engine
        gc.collect()
        freed = old() is None
        self.engine = engines.build_engine(
            self.model,
            engine_config=self.inputs.engine_config,
            schedule=lambda optimizer: get_scheduler(
                self.config.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS
            ),
        )
        engines.resume_schedule(self.engine, steps)
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            if name in states:
                # One rank has it: another one each time.
                owner = number % ranks.get_world_size()
                here = owner == ranks.get_rank()
                write_state(self.engine, parameter, states[name] if here else None, owner=owner)
        return freed


if __name__ == "__main__":
    main()
