"""Start an adapter on the ranks of a process group, watching what each rank holds; prints one JSON line a rank.

python start_on_ranks.py STAGE CACHE OUTPUT
"""

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from goat_ds import GoatConfig, demo
from goat_ds.base.inspect import inspect
from goat_ds.distributed import ranks
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.zero import decompose, partition
from goat_ds.zero import engine as engines
from goat_ds.zero.engine import Attention
from goat_ds.zero.waves import cost_of


def main() -> None:
    torch.set_num_threads(1)
    stage, cache, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    config = parse(["--ds_config", f"ds_configs/zero{stage}.json", "--precision", "fp32"])
    join_ranks(config, timeout_minutes=5)
    filled = read_inputs(config).engine_config
    base = engines.load_base(
        inspect(str(demo.base_path())), precision=config.precision, attention=Attention.SDPA, engine_config=filled
    )
    model = engines.attach_experts(base, GoatConfig(r=16, num_experts=4), engine_config=filled)
    held, work = watch_whole_weights(), watch_work()
    report = decompose.init_adapter(model, ADAPTER_NAME, seed=0, cache=cache)
    factors = {}
    for item in named_experts(model, ADAPTER_NAME):
        with partition.gathered(item.experts.parameters()):
            for name, parameter in item.experts.named_parameters():
                factors[f"{item.path}.{name}"] = parameter.detach().clone()
    save_file(factors, output / f"factors-{ranks.get_rank()}.safetensors")
    told = report._asdict() | {
        "most_whole_weights": held["most"],
        "cost": work["cost"],
        "frozen": sorted(frozen_names(model)),
    }
    (output / f"report-{ranks.get_rank()}.json").write_text(json.dumps(told))
    ranks.leave()


def watch_whole_weights() -> dict[str, int]:
    """Count how many whole weights this rank holds at once, and keep the largest count."""
    alive: list[Any] = []
    held = {"most": 0}
    send = partition.whole_on

    def counted(world_rank: int, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        whole = send(world_rank, parameter)
        if whole is not None:
            gc.collect()
            alive.append(weakref.ref(whole.untyped_storage()))
            alive[:] = [reference for reference in alive if reference() is not None]
            held["most"] = max(held["most"], len(alive))
        return whole

    partition.whole_on = counted
    return held


def watch_work() -> dict[str, int]:
    """Add up the cost of what this rank decomposes."""
    done = {"cost": 0}
    directions_of = decompose.directions_of

    def counted(weight_OI: torch.Tensor, *arguments: Any, **how: Any) -> Any:
        done["cost"] += cost_of((weight_OI.shape[0], weight_OI.shape[1]), decomposes=True)
        return directions_of(weight_OI, *arguments, **how)

    decompose.directions_of = counted
    return done


def frozen_names(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if "goat_" in name and not p.requires_grad}


if __name__ == "__main__":
    main()
