"""Build an engine on this rank, save a checkpoint, and print what was planned of both beside what there is."""

import json
import sys
from pathlib import Path
from typing import Any

from goat_ds.distributed import ranks
from goat_ds.plan.memory import Placement, checkpoint_bytes, optimizer, weights
from goat_ds.train.build import build
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.preflight import planner_of
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.checkpoint import save_checkpoint


def main(ds_config: str, folder: str, *flags: str) -> None:
    config = parse(["--ds_config", ds_config, "--output_dir", folder, "--svd_cache", f"{folder}/svd", *flags])
    join_ranks(config, timeout_minutes=5)
    Path(folder).mkdir(exist_ok=True)
    planner = planner_of(read_inputs(config, world_size=ranks.get_world_size()))
    parts = planned(planner.placement(ranks.get_world_size()))
    engine = build(read_inputs(config), num_steps=100).engine
    sharded: Any = engine.optimizer
    parameters = list(engine.module.parameters())
    found = {
        "weights": sum(map(partition.resident_bytes, parameters)),
        "masters": sum(flat.nbytes for flat in sharded.fp32_partitioned_groups_flat),
        "gradients": sharded.grad_partitions_flat_buffer.nbytes,
        "bucket": sum(bucket.buffer.nbytes for bucket in sharded.ipg_buckets.values()),
    }
    saved = save_checkpoint(engine, output_dir=Path(folder), step=0)
    files = saved.rglob("*.safetensors")
    on_disk = sum(path.stat().st_size for path in files)
    print(json.dumps({"planned": parts, "found": found, "checkpoint": [checkpoint_bytes(planner.skeleton), on_disk]}))
    engines.destroy(engine)
    ranks.leave()


def planned(placement: Placement) -> dict[str, int]:
    """Return what was planned of a new engine, in which nothing has been gathered yet."""
    of_model = sum(
        part.num_bytes for part in weights(placement) if "whole" not in part.name and "buffers" not in part.name
    )
    of_engine = {part.name: part.num_bytes for part in optimizer(placement)}
    return {
        "weights": of_model,
        "masters": of_engine["master weights, fp32"],
        "gradients": of_engine["gradients"],
        "bucket": of_engine["DeepSpeed's reduce bucket"],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
