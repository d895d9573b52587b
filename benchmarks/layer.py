"""What does one GoatLayer cost, against its frozen layer alone, PEFT's LoRA of the same rank, and with options?

    python benchmarks/layer.py [--tokens 1024] [--repetitions 11] [--shape "LLaMA-3-8B q"]

Forward and backward in bf16 on one thread, with a gradient for the input; the two that are compared take turns. The
frozen layer alone computes the gradient of its input and nothing else. Bytes are what autograd keeps between the
passes, parameters left out.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import results
import torch
from peft import LoraConfig, get_peft_model
from results import Row
from torch import Tensor, nn

from goat_ds import GoatConfig

R, NUM_EXPERTS, TOP_K = 32, 8, 2
DROPOUT = 0.05
MIB = 2**20
LLAMA = {  # in features, out features
    "LLaMA-3-8B q": (4096, 4096),
    "LLaMA-3-8B k": (4096, 1024),
    "LLaMA-3-8B up": (4096, 14336),
    "LLaMA-3-8B down": (14336, 4096),
}
GEMMA = {"Gemma-3-270M up": (640, 2048), "Gemma-3-270M down": (2048, 640)}
SHAPES = LLAMA | GEMMA
RESIDUALS = {"lowrank": ("low-rank residual", 1.25), "fold": ("folded residual", 1.05)}
OPTIONS: dict[str, dict[str, Any]] = {
    "all experts by their probabilities": {"top_k": NUM_EXPERTS},
    "a gated residual": {"residual": "gated"},
    "top_p routing": {"routing": "top_p"},
    "threshold routing": {"routing": "threshold"},
    "router noise and expert dropout": {"router_noise": 1.0, "expert_dropout": 0.1},
}
"""What may cost a little more than the default."""


class Pair(NamedTuple):
    """Two layers on the same input."""

    ours: Any
    rival: Any
    x: Tensor
    grad: Tensor


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="*", default=list(SHAPES))
    results.add_flag(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results.publish(rows(arguments), parser=parser, arguments=arguments)


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Return what is measured as rows."""
    for shape in arguments.shape:
        out_in = f"{SHAPES[shape][1]} x {SHAPES[shape][0]}"
        if shape in LLAMA:
            pair = pair_of(shape, goat, lambda weight_OI: linear(weight_OI)["layer"], num_tokens=arguments.tokens)
            question = f"one {shape} layer ({out_in}), low-rank residual, against the frozen layer alone"
            yield timed(question, pair, at_most=1.2, repetitions=arguments.repetitions)
            continue
        for residual, (words, at_most) in RESIDUALS.items():
            pair = pair_of(
                shape, lambda w, residual=residual: goat(w, residual=residual), lora, num_tokens=arguments.tokens
            )
            question = f"one {shape} layer ({out_in}), {words}, against PEFT's LoRA"
            yield timed(question, pair, at_most=at_most, repetitions=arguments.repetitions)
        for words, options in OPTIONS.items():
            pair = pair_of(shape, lambda w, options=options: goat(w, **options), goat, num_tokens=arguments.tokens)
            question = f"one {shape} layer ({out_in}), {words}, against top_k {TOP_K} and a low-rank residual"
            yield timed(question, pair, at_most=1.15, repetitions=arguments.repetitions)
        for dropout, words in ((0.0, ""), (DROPOUT, f", dropout {DROPOUT}")):
            pair = pair_of(
                shape,
                lambda w, dropout=dropout: goat(w, dropout=dropout),
                lambda w, dropout=dropout: lora(w, dropout=dropout),
                num_tokens=arguments.tokens,
            )
            yield Row(
                question=f"bytes kept for backward by one {shape} layer ({out_in}){words}, against PEFT's LoRA",
                ours=(kept_bytes(pair.ours, pair.x) / MIB,),
                rival=(kept_bytes(pair.rival, pair.x) / MIB,),
                unit="MiB",
                at_most=1.1,
            )


def pair_of(shape: str, ours: Callable[[Tensor], Any], rival: Callable[[Tensor], Any], *, num_tokens: int) -> Pair:
    """Make two layers of one weight, and what runs through them."""
    in_features, out_features = SHAPES[shape]
    weight_OI = torch.randn(out_features, in_features, dtype=torch.bfloat16) / in_features**0.5
    x = torch.randn(2, num_tokens // 2, in_features, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, num_tokens // 2, out_features, dtype=torch.bfloat16)
    return Pair(ours(weight_OI), rival(weight_OI), x, grad)


def linear(weight_OI: Tensor) -> nn.ModuleDict:
    """Return a model of one frozen layer."""
    out_features, in_features = weight_OI.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return nn.ModuleDict({"layer": layer})


def lora(weight_OI: Tensor, *, dropout: float = 0.0) -> Any:
    """Return the layer with PEFT's LoRA, in its dtype."""
    config = LoraConfig(r=R, lora_dropout=dropout, target_modules=["layer"])
    return get_peft_model(linear(weight_OI), config, autocast_adapter_dtype=False).base_model.model["layer"]  # type: ignore[arg-type]


def goat(weight_OI: Tensor, **options: Any) -> Any:
    """Return the layer with experts, filled with anything: what it costs does not depend on it."""
    settings = {"r": R, "num_experts": NUM_EXPERTS, "top_k": TOP_K} | options
    config = GoatConfig(**settings, target_modules=["layer"], deferred=True)
    layer: Any = get_peft_model(linear(weight_OI), config, autocast_adapter_dtype=False).base_model.model["layer"]  # type: ignore[arg-type]
    experts = layer.goat_experts["default"]
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    experts.ready = True
    # The balance loss's gradient is part of what is measured.
    experts.signal.upstream = 1.0
    return layer.train()


def timed(question: str, pair: Pair, *, at_most: float, repetitions: int) -> Row:
    """Time both layers in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions + 2):
        turns = [(pair.ours, seconds[0]), (pair.rival, seconds[1])]
        # Neither always follows the other.
        for layer, found in turns if repetition % 2 else reversed(turns):
            found.append(pass_both_ways(layer, pair.x, pair.grad))
    # The first two bring libraries and kernels into memory.
    return Row(question=question, ours=tuple(seconds[0][2:]), rival=tuple(seconds[1][2:]), unit="s", at_most=at_most)


def pass_both_ways(layer: Any, x: Tensor, grad: Tensor) -> float:
    """Return the seconds of one forward and backward: those worked, whatever else the machine does."""
    layer.zero_grad()
    x.grad = None
    began = time.process_time()
    layer(x).backward(grad)
    return time.process_time() - began


def kept_bytes(layer: Any, x: Tensor) -> int:
    """Count what autograd keeps from forward to backward."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


if __name__ == "__main__":
    main()
