"""Build engines on 4-bit bases on the ranks of a process group, counting the bytes that each rank holds.

    python quantize_on_ranks.py JOBS.json        a list of {"flags": [...], "output": folder}; started once per rank

Writes ``report-<rank>.json`` and, from the first rank, a checkpoint and ``weights.safetensors``: every 4-bit layer's
weight in fp32.
"""

import gc
import json
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from goat_ds.distributed import ranks
from goat_ds.train.build import build
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.tuner import layer as tuner_layer
from goat_ds.tuner.base_quantization import plain_path
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.tuner.quantized import QuantizedLinear
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.checkpoint import save_checkpoint
from goat_ds.zero.quantize import measure


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors made inside, while they live; a mapped file is address space, not memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.now_at_end = 0
        self.known: set[int] = set()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # What is no view an operator has just allocated. Looking that up in the process's maps would take minutes.
        can_be_mapped = any(result.alias_info is not None for result in func._schema.returns)
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not self.paused:
                self._count(tensor.untyped_storage(), can_be_mapped=can_be_mapped)
        return output

    def _count(self, storage: torch.UntypedStorage, *, can_be_mapped: bool) -> None:
        if (key := storage._cdata) in self.known:
            return
        is_mapped = can_be_mapped and storage.nbytes() >= 2**10 and is_mapped_file(storage.data_ptr())
        size = 0 if is_mapped else storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def without(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Leave out what a function makes, but for what it returns and is used afterwards."""

        def uncounted(*args: Any) -> Any:
            self.paused = True
            try:
                return work(*args)
            finally:
                self.paused = False

        return uncounted


def is_mapped_file(address: int) -> bool:
    """Whether an address lies in a safetensors file that is mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            first, last = line.split()[0].split("-")
            if int(first, 16) <= address < int(last, 16):
                return True
    return False


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    join_ranks(parse(jobs[0]["flags"]), timeout_minutes=5)
    svd, build_engine = tuner_layer.decompose, engines.build_engine
    for job in jobs:
        output = Path(job["output"])
        output.mkdir(parents=True, exist_ok=True)
        gc.collect()
        live = LiveBytes()
        tuner_layer.decompose = live.without(svd)
        engines.build_engine = partial(stop_counting, live, build_engine)
        live.__enter__()
        engine = build(read_inputs(parse(job["flags"])), num_steps=4).engine
        one_step(engine)
        model = engines.peft_model(engine)
        held = measure(model)._asdict() | {"peak": live.peak, "after": live.now_at_end}
        held["bytes_of_experts"] = bytes_of_experts(model)
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        held["block_sizes"] = sorted({layer.packing.block_size for layer in layers})
        held["compute_dtypes"] = sorted({str(layer.compute_dtype) for layer in layers})
        held["dtypes"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
        (output / f"report-{ranks.get_rank()}.json").write_text(json.dumps(held))
        weights = weights_of(engine)
        if ranks.is_first():
            save_file(weights, output / "weights.safetensors")
        save_checkpoint(engine, output_dir=output, step=1)
        engines.destroy(engine)
    ranks.leave()


def stop_counting(live: LiveBytes, build_engine: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Return the loaded model to DeepSpeed, whose buffers are not part of loading."""
    live.__exit__(None, None, None)
    live.now_at_end = live.now
    return build_engine(*args, **more)


def one_step(engine: Any) -> None:
    """Train a step, after which DeepSpeed holds what it holds for the rest of a run."""
    ids = torch.arange(3, 19)[None]
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()


def bytes_of_experts(model: torch.nn.Module) -> int:
    """Return what an adapter takes beside the base on this rank: its shards, and one layer's experts whole."""
    layers = [
        sum(2 * partition.full_shape(parameter).numel() for parameter in item.experts.parameters())
        for item in named_experts(model, ADAPTER_NAME)
    ]
    return sum(layers) // torch.distributed.get_world_size() + 2 * max(layers)


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Return every 4-bit layer's weight by its path in the base. A collective."""
    found = {}
    for path, layer in engines.peft_model(engine).get_base_model().named_modules():
        if isinstance(layer, QuantizedLinear):
            with partition.gathered([layer.weight]):
                found[plain_path(path)] = layer.weight_OI(torch.float32).clone()
    return found


if __name__ == "__main__":
    main()
