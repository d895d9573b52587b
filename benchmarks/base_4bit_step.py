"""What does a training step on a 4-bit base cost, against bitsandbytes' own layers with PEFT's LoRA?

    python benchmarks/base_4bit_step.py [--shapes gemma-3-270m llama-3-8b] [--tokens 512] [--repetitions 5]

Four decoder layers of Gemma-3-270M's shapes, one of LLaMA-3-8B's; bf16, NF4 in blocks of 64, adapters in bf16. A step
is forward with labels, backward to the embedding's output, and torch's AdamW. All ways take turns in one process on one
thread.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from results import Row
from setting import GEMMA_3_270M, LLAMA_3_8B
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
    "gemma-3-270m": {"num_hidden_layers": 4, **GEMMA_3_270M},
    "llama-3-8b": {"num_hidden_layers": 1, **LLAMA_3_8B},
}


class Way(NamedTuple):
    """A model that trains, and its optimizer."""

    model: PeftModel
    optimizer: torch.optim.Optimizer


def main() -> None:
    """Measure, in a process that has one thread from its start."""
    # bitsandbytes brings threads of its own, which torch.set_num_threads does not reach.
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="whose layers")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="list the costliest operators instead")
    results.add_flag(parser)
    arguments = parser.parse_args()
    rows = [row for shapes in arguments.shapes for row in measured(shapes, arguments)]
    if rows:
        results.publish(rows, parser=parser, arguments=arguments)


def write_base(folder: Path, shapes: dict[str, int]) -> None:
    """Write a base of a few layers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **shapes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measured(shapes: str, arguments: argparse.Namespace) -> list[Row]:
    """Time all ways in turn, or profile them, on layers of a model's shapes."""
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), SHAPES[shapes])
        ways = ways_to_train(Path(folder))
    input_ids = torch.randint(VOCABULARY, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    for way in ways.values():
        step(way, input_ids)
    if arguments.profile:
        for name, way in ways.items():
            profile(f"{name}, {shapes}", way, input_ids)
        return []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for _ in range(arguments.repetitions):
        for name in names:
            seconds[name].append(step(ways[name], input_ids))
        # None always follows the same one.
        names = [*names[1:], names[0]]
    return [
        Row(
            question=f"step on 4-bit layers of {shapes}, {arguments.tokens} tokens: {name}, against {RIVAL}",
            ours=tuple(seconds[name]),
            rival=tuple(seconds[RIVAL]),
            unit="s",
            at_most=TARGETS.get(name),
        )
        for name in ways
        if name != RIVAL
    ]


def ways_to_train(base_folder: Path) -> dict[str, Way]:
    """Return both kinds of layers with both adapters."""
    return {
        RIVAL: trained(bitsandbytes_base(base_folder), lora()),
        OURS: trained(our_base(base_folder), goat()),
        "ours + LoRA": trained(our_base(base_folder), lora()),
        "bitsandbytes + GOAT": trained(bitsandbytes_base(base_folder), goat()),
    }


def lora() -> LoraConfig:
    """Return the rival's adapter."""
    return LoraConfig(r=R, target_modules="all-linear")


def goat() -> GoatConfig:
    """Return the adapter of ours, to be filled with anything: what a step costs does not depend on it."""
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


def step(way: Way, input_ids: Tensor) -> float:
    """Train on one row; return the seconds."""
    began = time.process_time()  # with one thread it is the time worked, whatever else the machine does
    way.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    way.optimizer.step()
    way.optimizer.zero_grad()
    return time.process_time() - began


def profile(name: str, way: Way, input_ids: Tensor) -> None:
    """List where three steps spend their time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            step(way, input_ids)
    print(f"\n{name}, {input_ids.shape[1]} tokens, three steps")
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=48))


if __name__ == "__main__":
    main()
