"""What does a rank hold of a 4-bit base, while it is loaded and afterwards?

    python benchmarks/base_4bit_memory.py [--ranks 1 2 4] [--layers 8] [--hidden 1024] [--intermediate 2816]

Every way and number of ranks runs in fresh processes, under ZeRO-3 in bf16, on a LLaMA with random weights:

    mapped  map the files, decompose each weight for its experts, quantise it, shard the bytes
    shards  the same from 16-bit shards, which is how a base of another dtype is loaded
    hf      transformers with BitsAndBytesConfig on every rank, then PEFT's LoRA on it and deepspeed.initialize

Tensors are counted exactly, by their storages, on the thread that loads. What a mapped file lends costs a process no
memory and is not counted. The allowance of the peak is the rank's bf16 shard of the base, its shard of the experts, and
two whole copies of the largest weight. Workspace inside a library's operator is no tensor that could be counted; it
shows in the growth of the process's anonymous memory, which is printed beside.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed
from live_tensors import LiveTensors
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from goat_ds import GoatConfig
from goat_ds.train.config import parse, ranks_from_environment
from goat_ds.train.preflight import filled_ds_config
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize
from goat_ds.tuner.model import linear_shape, named_experts
from goat_ds.tuner.quantized import Packing
from goat_ds.zero import decompose as starts
from goat_ds.zero import ds_config, partition, quantize, ranks
from goat_ds.zero import engine as engines
from goat_ds.zero.ranks import Ranks

WAYS = ("mapped", "shards", "hf")
TARGETS = {"held": 1.02, "bits": 4.6, "peak": 1.0}
TOKENS = 32
VOCABULARY = 32000
SMALL = "small"
MIB = 2**20


class Loading(NamedTuple):
    """What loading a base took on this rank, in bytes."""

    peak: int
    """All live tensors at the worst moment, without the decompositions' workspace."""
    peak_with_workspace: int
    """The same with it."""
    after: int
    """All live tensors afterwards."""
    anonymous_peak: int
    """Growth of the process's anonymous memory."""


class Held(NamedTuple):
    """What one rank holds and held, in bytes."""

    num_values: int
    """Values of the quantised layers, on all ranks together."""
    loaded: int
    """Of the quantised layers, once the base is loaded and quantised."""
    trained: int | None
    """Of the quantised layers after a step; None where there was none."""
    kept: int | None
    """Of gathered quantised layers, between the forward and the backward of the step."""
    failure: str
    """Why there was no step."""
    allowance: int
    """What ``peak`` may be."""
    peak: int
    peak_with_workspace: int
    after: int
    anonymous_peak: int


class AnonymousMemory(threading.Thread):
    """Watches how far this process's anonymous resident memory grows, looking every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before = self._most = self._now()
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopped.wait(0.002):
            self._most = max(self._most, self._now())

    def stop(self) -> int:
        """Stop; give the growth in bytes."""
        self._stopped.set()
        self.join()
        return self._most - self._before

    def _now(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status holds no RssAnon")


def main() -> None:
    """Start each way in processes of its own, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--ways", choices=WAYS, nargs="*", default=list(WAYS))
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the base")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.base:
        measure(arguments.base, arguments.ways[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_base(base / SMALL, num_layers=1, hidden=256, intermediate=512)
        size = write_base(
            base, num_layers=arguments.layers, hidden=arguments.hidden, intermediate=arguments.intermediate
        )
        print(f"{size / 1e6:.0f} M parameters, {2 * size / MIB:.0f} MiB in bf16")
        print_head()
        for world_size in arguments.ranks:
            for way in arguments.ways:
                print_row(world_size, way, run(base, way, world_size=world_size))


def write_base(folder: Path, *, num_layers: int, hidden: int, intermediate: int) -> int:
    """Write a LLaMA with a small vocabulary; give the number of its parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def run(base: Path, way: str, *, world_size: int) -> list[Held]:
    """Run one way in fresh processes; give what each rank held."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [*launcher, __file__, "--base", str(base), "--ways", way]
    # With a fixed threshold, what is freed goes back to the system, and anonymous memory is what is in use.
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{way} on {world_size} ranks failed:\n{done.stdout[-6000:]}")
    return [Held(**json.loads(path.read_text())) for path in sorted(base.glob("rank*.json"))[:world_size]]


def measure(base_folder: Path, way: str) -> None:
    """Run one way on this rank and write down what it held."""
    torch.set_num_threads(1)
    config = parse(["--ds_config", str(Path(__file__).parents[1] / "ds_configs" / "zero3.json")])
    processes = ranks_from_environment(config)
    ranks.join(processes, timeout_minutes=30)
    filled = filled_ds_config(config, processes)
    held = (
        by_transformers(base_folder, filled)
        if way == "hf"
        else by_us(base_folder, filled, processes, mapped=way == "mapped")
    )
    (base_folder / f"rank{processes.world_rank}.json").write_text(json.dumps(held._asdict()))
    torch.distributed.barrier()
    ranks.leave()


def watched(load: Callable[[Path], Any], base_folder: Path) -> tuple[Any, Loading]:
    """Load a base; say what that took. A smaller one first brings in the libraries and the kernels' buffers."""
    load(base_folder / SMALL)
    gc.collect()
    memory, live = AnonymousMemory(), LiveTensors()
    with live, patch.object(starts, "decompose", live.as_workspace(starts.decompose)):
        model = load(base_folder)
    anonymous_peak = memory.stop()
    gc.collect()
    return model, Loading(live.peak, live.peak_with_workspace, live.held, anonymous_peak)


def by_us(base_folder: Path, engine_config: dict[str, Any], processes: Ranks, *, mapped: bool) -> Held:
    """Load, quantise and shard, then train one step."""
    quantization = BaseQuantization(
        packing=Packing(), dtype="bfloat16", weight_dtype="bfloat16", compute_dtype="bfloat16"
    )

    def load(folder: Path) -> Any:
        base = engines.load_base(
            str(folder),
            precision=ds_config.Precision.BF16,
            attention=engines.Attention.SDPA,
            engine_config=engine_config,
            quantization=quantization if mapped else None,
        )
        model = engines.attach_experts(base, GoatConfig(), engine_config=engine_config)
        starts.start_adapter(
            model,
            engines.ADAPTER_NAME,
            processes=processes,
            seed=0,
            cache=None,
            recipe=quantize.recipe_of(quantization, engine_config=engine_config),
        )
        return model

    model, loading = watched(load, base_folder)
    loaded = quantize.measure(model)
    experts = [item.experts for item in named_experts(model, engines.ADAPTER_NAME)]
    of_experts = sum(partition.resident_bytes(parameter) for item in experts for parameter in item.parameters())
    engine = engines.build_engine(
        model, engine_config=engine_config, schedule=lambda optimizer: get_scheduler("constant", optimizer)
    )
    kept = step(engine)
    return Held(
        num_values=loaded.num_values,
        loaded=loaded.bytes_here,
        trained=quantize.measure(model).bytes_here,
        kept=kept,
        failure="",
        allowance=allowance_of(base_folder, world_size=processes.world_size) + of_experts,
        **loading._asdict(),
    )


def by_transformers(base_folder: Path, engine_config: dict[str, Any]) -> Held:
    """Load as transformers does, then try to train one step."""

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            ),
        )

    # transformers finds it through a weak reference.
    sharding = HfDeepSpeedConfig(engine_config)
    base, loading = watched(load, base_folder)
    layers = [layer for _, layer in layers_to_quantize(base, kept=())]
    loaded = sum(map(bytes_of_4bit, layers))
    trained, kept, failure = None, None, ""
    try:
        kept = train_by_peft(base, engine_config)
        trained = sum(map(bytes_of_4bit, layers))
    except Exception as error:
        failure = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    del sharding
    return Held(
        num_values=sum(out_features * in_features for out_features, in_features in map(linear_shape, layers)),
        loaded=loaded,
        trained=trained,
        kept=kept,
        failure=failure,
        allowance=allowance_of(base_folder, world_size=torch.distributed.get_world_size()),
        **loading._asdict(),
    )


def train_by_peft(base: Any, engine_config: dict[str, Any]) -> int:
    """Put LoRA on what transformers loaded and train a step under ZeRO-3; give what ``step`` gives."""
    base.train()
    model = get_peft_model(base, LoraConfig(r=32, target_modules="all-linear"), autocast_adapter_dtype=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=engine_config, dist_init_required=False
    )
    return step(engine)


def step(engine: Any) -> int:
    """Train on one short row; give the gathered bytes of 4-bit layers that are still here between the passes."""
    input_ids = torch.arange(TOKENS)[None] % VOCABULARY
    with LiveTensors(only=torch.uint8) as live:
        loss = engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        kept = live.held
    engine.backward(loss)
    engine.step()
    return kept


def bytes_of_4bit(layer: Any) -> int:
    """Give what this rank holds of one of bitsandbytes' layers: values and statistics."""
    state = layer.weight.quant_state
    return partition.resident_bytes(layer.weight) + state.absmax.numel() * state.absmax.element_size()


def allowance_of(base_folder: Path, *, world_size: int) -> int:
    """Give the bytes of a rank's bf16 shard of the base and of two of its largest weights."""
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(base_folder))
    sizes = [parameter.numel() for parameter in skeleton.parameters()]
    return 2 * (sum(math.ceil(size / world_size) for size in sizes) + 2 * max(sizes))


def print_head() -> None:
    """Say what the columns are."""
    print("MiB of the rank that holds most")
    print("loaded, trained: the 4-bit layers after loading and after a step; ideal: 4.5 bits a value / ranks")
    print("kept: of the 4-bit layers, whole between forward and backward; live: all tensors after loading")
    print("peak: all tensors while loading, then with the decompositions' workspace, then anonymous memory")
    columns = ("loaded", "/ ideal", "trained", "/ ideal", "bits", "kept", "live", "peak", "allowed", "ratio")
    print(f"{'ranks':>5}  {'way':<6}{''.join(f'{name:>8}' for name in (*columns, '+ work', 'anon'))}")
    targets = ("", TARGETS["held"], "", TARGETS["held"], TARGETS["bits"], "", "", "", "", TARGETS["peak"])
    print(f"{'':5}  {'target'}{''.join(f'{target:>8}' for target in targets)}")


def print_row(world_size: int, way: str, all_held: list[Held]) -> None:
    """Print one line for one way on one number of ranks."""
    num_values = all_held[0].num_values
    ideal = Packing().num_bytes(num_values) / world_size
    loaded, live = most(all_held, "loaded"), most(all_held, "after")
    worst = max(all_held, key=lambda held: held.peak / held.allowance)
    cells = [f"{loaded / MIB:.1f}", f"{loaded / ideal:.3f}"]
    if failures := {held.failure for held in all_held if held.failure}:
        cells += ["-"] * 4
    else:
        trained = most(all_held, "trained")
        bits = 8 * trained / num_values * world_size
        cells += [f"{trained / MIB:.1f}", f"{trained / ideal:.3f}", f"{bits:.2f}"]
        cells += [f"{most(all_held, 'kept') / MIB:.1f}"]
    cells += [f"{size / MIB:.1f}" for size in (live, worst.peak, worst.allowance)]
    cells += [f"{worst.peak / worst.allowance:.3f}"]
    cells += [f"{most(all_held, name) / MIB:.1f}" for name in ("peak_with_workspace", "anonymous_peak")]
    print(f"{world_size:5}  {way:<6}{''.join(f'{cell:>8}' for cell in cells)}", flush=True)
    for failure in sorted(failures):
        print(f"{'':7}no step: {failure}", flush=True)


def most(all_held: list[Held], name: str) -> int:
    """Give the largest value of one quantity over the ranks."""
    return max(int(getattr(held, name)) for held in all_held)


if __name__ == "__main__":
    main()
