"""How long does starting an adapter on two ranks take, against every rank decomposing every weight?

    python benchmarks/startup.py [--layers 6] [--repeats 5]

Both run under ZeRO-3 in the same two processes, one thread each, in turn. The rival is what PEFT does for an SVD start:
gather each weight on every rank and call ``torch.linalg.svd`` on it. Shapes are those of Gemma-3-270M.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
import torch.distributed
from setting import GEMMA_3_270M, start_ranks
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from goat_ds import GoatConfig
from goat_ds.base.inspect import inspect
from goat_ds.distributed import ranks
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.decompose import init_adapter

TARGETS = {"cold": 0.30, "cached": 0.02}


def main() -> None:
    """Start the two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the base")
    parser.add_argument("--repeats", type=int, default=5, help="alternating repetitions")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    results.add_flag(parser)
    arguments = parser.parse_args()
    if arguments.base:
        rows = measure(arguments.base, repeats=arguments.repeats)
        if rows:
            results.publish(rows, parser=parser, arguments=arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), num_layers=arguments.layers)
        start_ranks(__file__, *sys.argv[1:], "--base", folder)


def write_base(folder: Path, *, num_layers: int) -> None:
    """Write a base with the layer shapes of Gemma-3-270M and a spectrum that decays."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=256,
        num_hidden_layers=num_layers,
        **GEMMA_3_270M,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(torch.linspace(1, 0.05, module.in_features))
    model.to(torch.bfloat16).save_pretrained(folder)


def measure(base_folder: Path, *, repeats: int) -> list[results.Row]:
    """Time the rival, a cold start and a cached one on this rank, in turn; the first rank gives the rows."""
    torch.set_num_threads(1)
    config = parse(["--ds_config", str(Path(__file__).parents[1] / "ds_configs" / "zero3.json")])
    join_ranks(config, timeout_minutes=30)
    filled = read_inputs(config).engine_config
    base = engines.load_base(
        inspect(str(base_folder)), precision=config.precision, attention=engines.Attention.SDPA, engine_config=filled
    )
    model = engines.attach_experts(base, GoatConfig(), engine_config=filled)
    cache = base_folder / "svd"
    rival: list[float] = []
    ours: dict[str, list[float]] = {name: [] for name in TARGETS}

    def start() -> None:
        init_adapter(model, ADAPTER_NAME, seed=0, cache=cache)

    for _ in range(repeats):
        rival.append(timed(lambda: decompose_everything(model)))
        if ranks.is_first():
            shutil.rmtree(cache, ignore_errors=True)
        for name in TARGETS:
            ours[name].append(timed(start))
    ranks.leave()
    return [row(name, ours[name], rival) for name in TARGETS] if ranks.is_first() else []


def row(name: str, ours: list[float], rival: list[float]) -> results.Row:
    """Return the answer for a cold or a cached start."""
    return results.Row(
        question=f"starting an adapter on 2 ranks, {name}, against torch.linalg.svd of every weight on every rank",
        ours=tuple(ours),
        rival=tuple(rival),
        unit="s",
        at_most=TARGETS[name],
    )


def decompose_everything(model: Any) -> None:
    """Do on this rank what an SVD start without sharing does on each."""
    for item in named_experts(model, ADAPTER_NAME):
        weight = item.layer.get_base_layer().weight
        with partition.gathered([weight]):
            torch.linalg.svd(weight.detach().float(), full_matrices=False)


def timed(work: Callable[[], None]) -> float:
    """Return the seconds until the slower rank is done."""
    torch.distributed.barrier()
    began = time.monotonic()
    work()
    return ranks.max_over_ranks(time.monotonic() - began)


if __name__ == "__main__":
    main()
