"""What does a training step on a 4-bit base cost, against bitsandbytes' own layers with PEFT's LoRA?

    python benchmarks/base_4bit_step.py [--shapes gemma-3-270m llama-3-8b] [--tokens 512] [--repetitions 9]

Four decoder layers of Gemma-3-270M's shapes, one of LLaMA-3-8B's; bf16, NF4 in blocks of 64, adapters in bf16. A step
is forward with labels, backward to the embedding's output, and torch's AdamW. All ways take turns in one process on one
thread; a line gives medians, and the quarter and three-quarter points over repetitions of the ratio to the rival.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from goat_ds import GoatConfig
from goat_ds.tuner.base_quantization import layers_to_quantize
from goat_ds.tuner.model import named_experts
from goat_ds.tuner.quantized import from_bitsandbytes, is_4bit

R, NUM_EXPERTS, TOP_K = 32, 8, 2
VOCABULARY = 256
RIVAL, OURS = "bitsandbytes + LoRA", "ours + GOAT"
TARGETS = {OURS: 1.05}
SHAPES: dict[str, dict[str, int]] = {
    "gemma-3-270m": {
        "num_hidden_layers": 4,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "llama-3-8b": {
        "num_hidden_layers": 1,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


class Cost(NamedTuple):
    """Seconds of the parts of a step."""

    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        """All of it."""
        return sum(self)


class Way(NamedTuple):
    """A model that trains, and its optimizer."""

    model: PeftModel
    optimizer: torch.optim.Optimizer


def main() -> None:
    """Write the base and measure in a process with one thread, or be that process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="whose layers")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="list the costliest operators instead")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.base:
        measure(arguments.base, arguments)
        return
    for shapes in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder), SHAPES[shapes])
            print(f"\n{shapes}: r={R} E={NUM_EXPERTS} k={TOP_K}, bf16, one thread; ratio to {RIVAL}", flush=True)
            # bitsandbytes brings threads of its own, which torch.set_num_threads does not reach.
            command = [sys.executable, __file__, *sys.argv[1:], "--base", folder]
            subprocess.run(command, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})


def write_base(folder: Path, shapes: dict[str, int]) -> None:
    """Write a base of a few layers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **shapes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(base_folder: Path, arguments: argparse.Namespace) -> None:
    """Time all ways in turn, or profile them."""
    torch.set_num_threads(1)
    ways = {
        RIVAL: trained(bitsandbytes_base(base_folder), LoraConfig(r=R, target_modules="all-linear")),
        OURS: trained(our_base(base_folder), goat()),
        "ours + LoRA": trained(our_base(base_folder), LoraConfig(r=R, target_modules="all-linear")),
        "bitsandbytes + GOAT": trained(bitsandbytes_base(base_folder), goat()),
    }
    for num_tokens in arguments.tokens:
        input_ids = torch.randint(VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            for way in ways.values():
                step(way, input_ids)
        if arguments.profile:
            for name, way in ways.items():
                profile(name, way, input_ids)
            continue
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        names = list(ways)
        for _ in range(arguments.repetitions):
            for name in names:
                costs[name].append(step(ways[name], input_ids))
            # None always follows the same one.
            names = [*names[1:], names[0]]
        report(num_tokens, costs)


def goat() -> GoatConfig:
    """Give the adapter of ours, to be filled with anything: what a step costs does not depend on it."""
    return GoatConfig(r=R, num_experts=NUM_EXPERTS, top_k=TOP_K, residual="lowrank", deferred=True)


def bitsandbytes_base(folder: Path) -> Any:
    """Load the base as transformers quantises it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)


def our_base(folder: Path) -> Any:
    """Load the same base, bit for bit, with our layers."""
    base = bitsandbytes_base(folder)
    for path, layer in layers_to_quantize(base, kept=()):
        assert is_4bit(layer)
        base.set_submodule(path, from_bitsandbytes(layer, dtype=torch.bfloat16, compute_dtype=torch.bfloat16))
    # What PEFT and transformers ask before they treat layers as bitsandbytes'.
    del base.config.quantization_config, base.hf_quantizer
    base.is_quantized = base.is_loaded_in_4bit = False
    return base


def trained(base: Any, config: GoatConfig | LoraConfig) -> Way:
    """Put an adapter in bf16 on a base."""
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        # PEFT gives adapters on packed weights torch's default dtype.
        if "lora_" in name or "goat_experts" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
        if "goat_experts" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if isinstance(config, GoatConfig):
        for item in named_experts(model, "default"):
            item.experts.ready = True
    # As below other layers: the first one's gradient is not left out.
    base.enable_input_require_grads()
    model.train()
    return Way(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))


def step(way: Way, input_ids: Tensor) -> Cost:
    """Train on one row."""
    marks = [time.process_time()]  # with one thread it is the time worked, whatever else the machine does
    loss = way.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    marks.append(time.process_time())
    loss.backward()
    marks.append(time.process_time())
    way.optimizer.step()
    way.optimizer.zero_grad()
    marks.append(time.process_time())
    return Cost(*(after - before for before, after in itertools.pairwise(marks)))


def profile(name: str, way: Way, input_ids: Tensor) -> None:
    """List where three steps spend their time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step(way, input_ids)
    print(f"\n{name}, {input_ids.shape[1]} tokens, three steps")
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=48))


def report(num_tokens: int, costs: dict[str, list[Cost]]) -> None:
    """Print medians, spread and ratios."""
    print(f"\n{num_tokens} tokens")
    head = ("step ms", "forward", "backward", "AdamW", "ratio", "quartiles", "target")
    print(f"{'':22}{''.join(f'{name:>11}' for name in head)}")
    for name, found in costs.items():
        medians = [statistics.median(values) for values in ([cost.step for cost in found], *zip(*found, strict=True))]
        ratios = [cost.step / rival.step for cost, rival in zip(found, costs[RIVAL], strict=True)]
        low, _, high = statistics.quantiles(ratios)
        ratio = medians[0] / statistics.median(cost.step for cost in costs[RIVAL])
        times = "".join(f"{seconds * 1e3:11.1f}" for seconds in medians)
        print(f"{name:22}{times}{ratio:11.3f}{f'{low:.2f}-{high:.2f}':>11}{TARGETS.get(name, ''):>11}")


if __name__ == "__main__":
    main()
