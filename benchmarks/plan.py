"""Does a run need what was planned for it?

    python benchmarks/plan.py [--layers 6] [--hidden 768] [--intermediate 2048] [--tokens 512]

Plans a run of two ranks from the config of a LLaMA alone, then runs it for two steps, by goat_ds' own loading, loss and
engine, and counts all live tensors by their storages: the most until the engine is ready, and the most in the second
step. A weight that stays in a mapped file below ZeRO-3 counts as what it becomes on a device. The reduce bucket is made
smaller than DeepSpeed's gibibyte, beside which nothing else would count. Workspace inside a library's operator is no
tensor and is neither planned nor counted.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
import torch.distributed
from live_tensors import LiveTensors, is_mapped
from results import Row
from setting import start_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from goat_ds.data import MicroBatch, StepBatch
from goat_ds.distributed import ranks
from goat_ds.train.build import build
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.objective import objective
from goat_ds.train.preflight import planner_of
from goat_ds.zero import engine as engines

WORLD_SIZE = 2
NUM_STEPS = 2
REDUCE_BUCKET = 1_000_000
MIB = 2**20


class Case(NamedTuple):
    """A way to run."""

    name: str
    stage: int
    flags: tuple[str, ...] = ()


CASES = (
    Case("ZeRO-2", 2),
    Case("ZeRO-3", 3),
    Case("ZeRO-3, 4-bit base", 3, ("--load_in_4bit",)),
    Case("ZeRO-3, checkpointing", 3, ("--gradient_checkpointing", "non_reentrant")),
)


class Used(NamedTuple):
    """The most a rank held, in bytes."""

    loading: int
    training: int


def main() -> None:
    """Plan and run every case, or be one rank of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the base")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch, each with a label")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, default=0, help=argparse.SUPPRESS)
    results.add_flag(parser)
    arguments = parser.parse_args()
    if arguments.base:
        be_a_rank(arguments.base, CASES[arguments.case], num_tokens=arguments.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), arguments)
        rows = [
            row
            for number, case in enumerate(CASES)
            for row in compare(Path(folder), number, case, num_tokens=arguments.tokens)
        ]
    results.publish(rows, parser=parser, arguments=arguments)


def write_base(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a LLaMA with random weights, and the ds_configs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    ours = Path(__file__).parents[1] / "ds_configs"
    for stage in (2, 3):
        content = json.loads((ours / f"zero{stage}.json").read_text())
        content["zero_optimization"]["reduce_bucket_size"] = REDUCE_BUCKET
        (folder / f"zero{stage}.json").write_text(json.dumps(content))


def settings(folder: Path, case: Case, *, num_tokens: int) -> TrainConfig:
    """Return the settings of a case; its decompositions are never in the cache."""
    paths = ["--model", str(folder), "--ds_config", str(folder / f"zero{case.stage}.json")]
    caches = ["--output_dir", str(folder / "run"), "--svd_cache", str(folder / f"svd {case.name}")]
    return parse([*paths, *caches, "--max_length", str(num_tokens), *case.flags])


def compare(folder: Path, number: int, case: Case, *, num_tokens: int) -> list[Row]:
    """Plan a case, run it, and set the two beside each other."""
    planner = planner_of(read_inputs(settings(folder, case, num_tokens=num_tokens), world_size=WORLD_SIZE))
    # Device and host are one memory here, so the worst phase is that of both together.
    loading = max(phase.everywhere for phase in planner.loading_phases(WORLD_SIZE))
    planned = (loading, planner.in_training(WORLD_SIZE).everywhere)
    used = run(folder, number, num_tokens=num_tokens)
    return [
        Row(
            question=f"planned bytes {when}, {case.name}, 2 ranks, against measured",
            ours=(plan / MIB,),
            rival=(measured / MIB,),
            unit="MiB",
            at_least=0.9,
            at_most=1.1,
        )
        for when, plan, measured in zip(("while loading", "in training"), planned, used, strict=True)
    ]


def run(folder: Path, number: int, *, num_tokens: int) -> Used:
    """Run a case in fresh processes; return the most that any rank held."""
    flags = ["--base", folder, "--case", number, "--tokens", num_tokens]
    start_ranks(__file__, *flags, world_size=WORLD_SIZE, quietly=True)
    found = [Used(**json.loads((folder / f"rank{rank}.json").read_text())) for rank in range(WORLD_SIZE)]
    return Used(max(used.loading for used in found), max(used.training for used in found))


def be_a_rank(folder: Path, case: Case, *, num_tokens: int) -> None:
    """Load and train, and write down what this rank held."""
    torch.set_num_threads(1)
    config = settings(folder, case, num_tokens=num_tokens)
    join_ranks(config, timeout_minutes=10)
    with LiveTensors() as live:
        engine = build(read_inputs(config), num_steps=100).engine
        gc.collect()
        mapped = sum(p.nbytes for p in engine.module.parameters() if p.numel() and is_mapped(p))
        loading = live.peak
        batch = micro_batch(num_tokens)
        for _ in range(NUM_STEPS):
            live.peak = live.held
            train_step(engine, batch)
        used = Used(loading + mapped, live.peak + mapped)
    (folder / f"rank{ranks.get_rank()}.json").write_text(json.dumps(used._asdict()))
    torch.distributed.barrier()
    engines.destroy(engine)
    ranks.leave()


def micro_batch(num_tokens: int) -> MicroBatch:
    """Make a row of two documents."""
    row = torch.arange(num_tokens)[None] % 64
    halves = (num_tokens // 2, num_tokens - num_tokens // 2)
    return MicroBatch(
        input_ids=row,
        position_ids=torch.cat([torch.arange(half) for half in halves])[None],
        labels=row,
        label_index=torch.arange(num_tokens),
        num_tokens=num_tokens,
        is_filler=False,
    )


def train_step(engine: Any, batch: MicroBatch) -> None:
    """Train as the loop does."""
    step = StepBatch(0, [batch], batch.num_tokens * WORLD_SIZE, WORLD_SIZE, [0])
    tuner = engines.peft_model(engine).base_model
    loss = objective(engine, tuner, batch, step_batch=step, num_micro_batches=WORLD_SIZE)
    engine.backward(loss.total)
    engine.step()


if __name__ == "__main__":
    main()
