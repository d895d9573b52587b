"""What does a checkpoint cost in bytes and seconds, against the one that DeepSpeed itself writes?

    python benchmarks/checkpoint.py [--layers 4] [--tokens 512] [--repetitions 5]

Both save the same engine under ZeRO-3 in bf16 on two ranks of one thread each, in turn. The rival is
``engine.save_checkpoint(dir, exclude_frozen_parameters=True)``: pickles of each rank that load on that number of ranks
only, without the initial factors of the experts, left to the kernel to be written. Ours loads on any number of ranks,
has the PEFT adapter in it and a hash of every file, and is on the disk when it has its name. Shapes are those of
Gemma-3-270M, with random weights, r 32 and 8 experts; the sample of the data that a run keeps beside is left out. Bytes
are also held against 12 for each trained parameter (fp32 value and Adam's moments) and the adapter's folder. A step is
forward, backward and update of one row a rank.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
import torch.distributed
from results import Row
from setting import GEMMA_3_270M, ignore_calls_of_libraries, start_ranks
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, get_scheduler

from goat_ds import GoatConfig
from goat_ds.base.inspect import inspect
from goat_ds.distributed import ranks
from goat_ds.precision import Precision
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.tuner.model import ADAPTER_NAME
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.checkpoint import ADAPTER_FOLDER, save_checkpoint
from goat_ds.zero.decompose import init_adapter

RIVAL, OURS = "DeepSpeed", "ours"
SAVE_STEPS = 50
VOCABULARY = 256
MIB = 2**20


class Saved(NamedTuple):
    """What one checkpoint took."""

    seconds: float
    """Until the slower rank was done."""
    num_bytes: int
    """Of all files."""
    adapter_bytes: int
    """Of the adapter's folder; 0 where there is none."""


def main() -> None:
    """Start the two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the base")
    parser.add_argument("--tokens", type=int, default=512, help="of the row of a rank in a step")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    results.add_flag(parser)
    arguments = parser.parse_args()
    if arguments.base:
        rows = measure(arguments.base, num_tokens=arguments.tokens, repetitions=arguments.repetitions)
        if rows:
            results.publish(rows, parser=parser, arguments=arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), num_layers=arguments.layers)
        start_ranks(__file__, *sys.argv[1:], "--base", folder)


def write_base(folder: Path, *, num_layers: int) -> None:
    """Write a base with the layer shapes of Gemma-3-270M."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=num_layers,
        **GEMMA_3_270M,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(base_folder: Path, *, num_tokens: int, repetitions: int) -> list[Row]:
    """Time steps and checkpoints on this rank, in turn; return what they took on the first rank."""
    ignore_calls_of_libraries()
    torch.set_num_threads(1)
    config = parse(["--ds_config", str(Path(__file__).parents[1] / "ds_configs" / "zero3.json")])
    join_ranks(config, timeout_minutes=30)
    engine = engine_of(base_folder, read_inputs(config).engine_config)
    ways = ways_to_save(engine)
    steps: dict[str, list[float]] = {name: [] for name in ways}
    saved: dict[str, list[Saved]] = {name: [] for name in ways}
    names = list(ways)
    for _ in range(repetitions + 1):
        for name in names:
            steps[name].append(timed(lambda: step(engine, num_tokens=num_tokens)))
            saved[name].append(save(ways[name], base_folder / "saved"))
        # Neither always follows the other.
        names.reverse()
    rows = rows_of(saved, steps[OURS], num_trained=num_trained(engine)) if ranks.is_first() else []
    engines.destroy(engine)
    ranks.leave()
    return rows


def engine_of(base_folder: Path, engine_config: dict[str, Any]) -> Any:
    """Load the base, start experts on it, give both to DeepSpeed."""
    base = engines.load_base(
        inspect(str(base_folder)),
        precision=Precision.BF16,
        attention=engines.Attention.SDPA,
        engine_config=engine_config,
    )
    model = engines.attach_experts(base, GoatConfig(), engine_config=engine_config)
    init_adapter(model, ADAPTER_NAME, seed=0, cache=None)
    return engines.build_engine(
        model, engine_config=engine_config, schedule=lambda optimizer: get_scheduler("constant", optimizer)
    )


def ways_to_save(engine: Any) -> dict[str, Callable[[Path], object]]:
    """Return what writes a checkpoint into a folder, by name."""

    def ours(folder: Path) -> None:
        save_checkpoint(engine, output_dir=folder, step=1)

    def deepspeeds(folder: Path) -> None:
        engine.save_checkpoint(str(folder), tag="1", exclude_frozen_parameters=True)

    return {RIVAL: deepspeeds, OURS: ours}


def step(engine: Any, *, num_tokens: int) -> None:
    """Train on one row of random tokens."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    input_ids = torch.randint(VOCABULARY, (1, num_tokens), generator=generator)
    engine.backward(engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
    engine.step()


def save(write: Callable[[Path], object], folder: Path) -> Saved:
    """Time one checkpoint and weigh it, then delete it."""
    if ranks.is_first():
        folder.mkdir()
    seconds = timed(lambda: write(folder))
    num_bytes = bytes_below(folder)
    adapter_bytes = sum(map(bytes_below, folder.rglob(ADAPTER_FOLDER)))
    torch.distributed.barrier()
    if ranks.is_first():
        shutil.rmtree(folder)
    return Saved(seconds, num_bytes, adapter_bytes)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds until the slower rank is done."""
    torch.distributed.barrier()
    began = time.monotonic()
    work()
    return ranks.max_over_ranks(time.monotonic() - began)


def bytes_below(folder: Path) -> int:
    """Add up the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def num_trained(engine: Any) -> int:
    """Count the trained parameters of all ranks together."""
    return sum(partition.full_shape(p).numel() for p in engine.module.parameters() if p.requires_grad)


def rows_of(saved: dict[str, list[Saved]], steps: list[float], *, num_trained: int) -> list[Row]:
    """Return the answers."""
    # The first ones make the optimizer's state, and bring libraries into memory.
    ours, rival, steps = saved[OURS][1:], saved[RIVAL][1:], steps[1:]
    seconds = tuple(item.seconds for item in ours)
    mib, needed = ours[0].num_bytes / MIB, (12 * num_trained + ours[0].adapter_bytes) / MIB
    what = f"checkpoint of {num_trained / 1e6:.2f} M trained parameters on 2 ranks"
    return [
        Row(
            question=f"{what}, against DeepSpeed's own",
            ours=seconds,
            rival=tuple(item.seconds for item in rival),
            unit="s",
        ),
        Row(
            question=f"{what}, against {SAVE_STEPS} steps",
            ours=seconds,
            rival=tuple(SAVE_STEPS * step for step in steps),
            unit="s",
            at_most=0.02,
        ),
        Row(
            question=f"bytes of a {what}, against DeepSpeed's own",
            ours=(mib,),
            rival=(rival[0].num_bytes / MIB,),
            unit="MiB",
        ),
        Row(
            question=f"bytes of a {what}, against 12 a trained parameter and the adapter",
            ours=(mib,),
            rival=(needed,),
            unit="MiB",
            at_most=1.02,
        ),
    ]


if __name__ == "__main__":
    main()
