"""What does a rank hold of a 4-bit base, while it is loaded and afterwards?

    python benchmarks/base_4bit_memory.py [--ranks 2] [--layers 8] [--hidden 1024] [--intermediate 2816]

Every way and number of ranks runs in fresh processes, under ZeRO-3 in bf16, on a LLaMA with random weights:

    mapped  map the files, decompose each weight for its experts, quantise it, shard the bytes
    shards  the same from 16-bit shards, which is how a base of another dtype is loaded
    hf      transformers with BitsAndBytesConfig on every rank, then PEFT's LoRA on it and deepspeed.initialize

The answers are those of the rank that holds most. Tensors are counted by their storages, on the thread that loads,
without the workspace of the decompositions. The allowance of the peak is the rank's bf16 shard of the base, its shard
of the experts, and two whole copies of the largest weight.
"""

import argparse
import gc
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import deepspeed
import results
import torch
import torch.distributed
from live_tensors import LiveTensors
from peft import LoraConfig, get_peft_model
from results import Row
from setting import start_ranks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from goat_ds import GoatConfig
from goat_ds.base.inspect import inspect
from goat_ds.distributed import ranks
from goat_ds.precision import Precision
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.tuner import layer as layers
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize
from goat_ds.tuner.model import ADAPTER_NAME, linear_shape, named_experts
from goat_ds.tuner.quantized import Packing
from goat_ds.zero import decompose as starts
from goat_ds.zero import engine as engines
from goat_ds.zero import partition, quantize

OURS = {"mapped": "mapped files", "shards": "16-bit shards"}
RIVAL = "hf"
TOKENS = 32
VOCABULARY = 32000
SMALL = "small"
MIB = 2**20


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
    peak: int
    """All live tensors at the worst moment of loading."""
    allowance: int = 0
    """What ``peak`` may be; of ours."""
    failure: str = ""
    """Why there was no step."""


def main() -> None:
    """Start each way in processes of its own, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2])
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the base")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    results.add_flag(parser)
    arguments = parser.parse_args()
    if arguments.base:
        measure(arguments.base, arguments.way)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_base(base / SMALL, num_layers=1, hidden=256, intermediate=512)
        write_base(base, num_layers=arguments.layers, hidden=arguments.hidden, intermediate=arguments.intermediate)
        rows = [row for world_size in arguments.ranks for row in rows_of(base, world_size)]
    results.publish(rows, parser=parser, arguments=arguments)


def write_base(folder: Path, *, num_layers: int, hidden: int, intermediate: int) -> None:
    """Write a LLaMA with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(base: Path, way: str, *, world_size: int) -> list[Held]:
    """Run one way in fresh processes; return what each rank held."""
    start_ranks(__file__, "--base", base, "--way", way, world_size=world_size, quietly=True)
    return [Held(**json.loads(path.read_text())) for path in sorted(base.glob("rank*.json"))[:world_size]]


def measure(base_folder: Path, way: str) -> None:
    """Run one way on this rank and write down what it held."""
    torch.set_num_threads(1)
    config = parse(["--ds_config", str(Path(__file__).parents[1] / "ds_configs" / "zero3.json")])
    join_ranks(config, timeout_minutes=30)
    filled = read_inputs(config).engine_config
    held = by_transformers(base_folder, filled) if way == RIVAL else by_us(base_folder, filled, mapped=way == "mapped")
    (base_folder / f"rank{ranks.get_rank()}.json").write_text(json.dumps(held._asdict()))
    torch.distributed.barrier()
    ranks.leave()


def watched(load: Callable[[Path], Any], base_folder: Path) -> tuple[Any, int]:
    """Load a base; return it and the peak. A smaller one first brings in what the libraries keep."""
    load(base_folder / SMALL)
    gc.collect()
    live = LiveTensors()
    with live, patch.object(layers, "decompose", live.without(layers.decompose)):
        model = load(base_folder)
    return model, live.peak


def by_us(base_folder: Path, engine_config: dict[str, Any], *, mapped: bool) -> Held:
    """Load, quantise and shard, then train one step."""
    quantization = BaseQuantization(
        packing=Packing(), dtype="bfloat16", weight_dtype="bfloat16", compute_dtype="bfloat16"
    )

    def load(folder: Path) -> Any:
        base = engines.load_base(
            inspect(str(folder)),
            precision=Precision.BF16,
            attention=engines.Attention.SDPA,
            engine_config=engine_config,
            quantization=quantization if mapped else None,
        )
        model = engines.attach_experts(base, GoatConfig(), engine_config=engine_config)
        starts.init_adapter(
            model,
            ADAPTER_NAME,
            seed=0,
            cache=None,
            recipe=quantize.recipe_of(quantization, engine_config=engine_config),
        )
        return model

    model, peak = watched(load, base_folder)
    loaded = quantize.measure(model)
    experts = [item.experts for item in named_experts(model, ADAPTER_NAME)]
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
        peak=peak,
        allowance=allowance_of(base_folder, world_size=ranks.get_world_size()) + of_experts,
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
    base, peak = watched(load, base_folder)
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
        peak=peak,
        failure=failure,
    )


def train_by_peft(base: Any, engine_config: dict[str, Any]) -> int:
    """Put LoRA on what transformers loaded and train a step under ZeRO-3; return what ``step`` gives."""
    base.train()
    model = get_peft_model(base, LoraConfig(r=32, target_modules="all-linear"), autocast_adapter_dtype=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=engine_config, dist_init_required=False
    )
    return step(engine)


def step(engine: Any) -> int:
    """Train on one short row; return the gathered bytes of 4-bit layers that are still here between the passes."""
    input_ids = torch.arange(TOKENS)[None] % VOCABULARY
    with LiveTensors(only=torch.uint8) as live:
        loss = engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        kept = live.held
    engine.backward(loss)
    engine.step()
    return kept


def bytes_of_4bit(layer: Any) -> int:
    """Return what this rank holds of one of bitsandbytes' layers: values and statistics."""
    state = layer.weight.quant_state
    return partition.resident_bytes(layer.weight) + state.absmax.numel() * state.absmax.element_size()


def allowance_of(base_folder: Path, *, world_size: int) -> int:
    """Return the bytes of a rank's bf16 shard of the base and of two of its largest weights."""
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(base_folder))
    sizes = [parameter.numel() for parameter in skeleton.parameters()]
    return 2 * (sum(math.ceil(size / world_size) for size in sizes) + 2 * max(sizes))


def rows_of(base: Path, world_size: int) -> list[Row]:
    """Run every way on a number of ranks; return the answers."""
    found = {way: run(base, way, world_size=world_size) for way in (*OURS, RIVAL)}
    for failure in sorted({held.failure for held in found[RIVAL] if held.failure}):
        print(f"transformers and PEFT on {world_size} ranks made no step: {failure}", flush=True)
    where = {way: f"on {world_size} ranks from {words}" for way, words in OURS.items()}
    rows = [row for way in OURS for row in rows_against_ideal(where[way], found[way])]
    return rows + rows_against_rival(where["mapped"], found["mapped"], found[RIVAL])


def rows_against_ideal(where: str, ours: list[Held]) -> list[Row]:
    """Hold one way against what it may take."""
    ideal = Packing().num_bytes(ours[0].num_values) / len(ours)
    worst = max(ours, key=lambda held: held.peak / held.allowance)
    layers = f"4-bit layers of a rank {where}"
    return [
        in_mib(f"{layers}, loaded, against 4.5 bits a value / ranks", most(ours, "loaded"), ideal, at_most=1.02),
        in_mib(f"{layers}, after a step, against 4.5 bits a value / ranks", most(ours, "trained"), ideal, at_most=1.02),
        in_mib(f"peak of loading {where}, against what is allowed", worst.peak, worst.allowance, at_most=1.0),
    ]


def rows_against_rival(where: str, ours: list[Held], rival: list[Held]) -> list[Row]:
    """Hold one way against transformers and PEFT."""
    layers = f"4-bit layers of a rank {where}"
    question = f"peak of loading, with experts, {where}, against transformers' without an adapter"
    rows = [in_mib(question, most(ours, "peak"), most(rival, "peak"))]
    if not any(held.failure for held in rival):
        question = f"{layers}, {{}}, against transformers and PEFT"
        rows.append(in_mib(question.format("after a step"), most(ours, "trained"), most(rival, "trained")))
        # One rank gathers nothing.
        if kept := most(rival, "kept"):
            rows.append(in_mib(question.format("whole between the passes"), most(ours, "kept"), kept))
    return rows


def in_mib(question: str, ours: float, rival: float, *, at_most: float | None = None) -> Row:
    """Put bytes into a row."""
    return Row(question=question, ours=(ours / MIB,), rival=(rival / MIB,), unit="MiB", at_most=at_most)


def most(all_held: list[Held], name: str) -> int:
    """Return the largest value of one quantity over the ranks."""
    return max(int(getattr(held, name)) for held in all_held)


if __name__ == "__main__":
    main()
