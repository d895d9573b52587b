"""What does one GoatLayer cost next to PEFT's LoRA of the same rank on the same base layer?

Forward and backward alternate between the two, so that a busy machine slows both; a line gives the medians and the
quarter and three-quarter points of the ratio over repetitions, and the bytes autograd keeps between the passes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from goat_ds import GoatConfig

R, NUM_EXPERTS, TOP_K = 32, 8, 2
SHAPES = {  # in features, out features
    "Gemma-3-270M up": (640, 2048),
    "Gemma-3-270M down": (2048, 640),
    "LLaMA-3.2-1B q": (2048, 2048),
    "LLaMA-3.2-1B k": (2048, 512),
    "1024 x 4096": (1024, 4096),
    "4096 x 1024": (4096, 1024),
}
TARGETS = {"lowrank": 1.25, "fold": 1.05}


class Cost(NamedTuple):
    """Seconds of forward and backward, and bytes kept between them."""

    seconds: float
    saved_bytes: int


def main() -> None:
    """Print one line for each shape, dtype and residual."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="*", default=list(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"r={R} E={NUM_EXPERTS} k={TOP_K}, {args.tokens} tokens, one thread; ratio = GOAT / LoRA")
    print(f"{'layer':<20}{'dtype':<10}{'residual':<10}{'LoRA ms':>9}{'GOAT ms':>9}{'ratio':>7}  quartiles   saved")
    for shape in args.shape:
        for dtype in (torch.float32, torch.bfloat16):
            for residual in TARGETS:
                print(f"{shape:<20}{str(dtype)[6:]:<10}{residual:<10}" + compare(shape, dtype, residual, args))


def compare(shape: str, dtype: torch.dtype, residual: str, args: argparse.Namespace) -> str:
    """Measure both layers in turn and format the medians."""
    in_features, out_features = SHAPES[shape]
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
    x = torch.randn(2, args.tokens // 2, in_features, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, args.tokens // 2, out_features, dtype=dtype)
    goat = GoatConfig(r=R, num_experts=NUM_EXPERTS, top_k=TOP_K, residual=residual, target_modules=["layer"])
    lora = LoraConfig(r=R, target_modules=["layer"])
    layers = [adapted(weight, config) for config in (lora, goat)]
    costs: list[list[Cost]] = [[], []]
    for _ in range(args.repetitions + 2):
        for layer, found in zip(layers, costs, strict=True):
            found.append(measure(layer, x, grad))
    lora_s, goat_s = ([cost.seconds for cost in found[2:]] for found in costs)
    low, _, high = statistics.quantiles([g / b for g, b in zip(goat_s, lora_s, strict=True)])
    ratio = statistics.median(goat_s) / statistics.median(lora_s)
    saved = costs[1][-1].saved_bytes / costs[0][-1].saved_bytes
    return (
        f"{statistics.median(lora_s) * 1e3:9.2f}{statistics.median(goat_s) * 1e3:9.2f}{ratio:7.3f}"
        f"  {low:.2f}-{high:.2f}{saved:8.3f}"
    )


def adapted(weight_OI: Tensor, config: GoatConfig | LoraConfig) -> Callable[[Tensor], Tensor]:
    """Put the adapter on one linear layer, with adapter and base in one dtype."""
    out_features, in_features = weight_OI.shape
    base = nn.ModuleDict({"layer": nn.Linear(in_features, out_features, bias=False, dtype=weight_OI.dtype)})
    base["layer"].weight.data.copy_(weight_OI)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for experts in (m for m in model.modules() if hasattr(m, "signal") and hasattr(m, "A")):
        experts.signal.upstream = 1.0  # the balance gradient is part of what is measured
    return model.base_model.model["layer"]


def measure(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Cost:
    """Time one forward and backward, then run another that counts what it saves."""
    layer.zero_grad()  # type: ignore[attr-defined]
    began = time.process_time()  # with one thread it is the time worked, whatever else the machine does
    layer(x).backward(grad)
    seconds = time.process_time() - began
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}  # type: ignore[attr-defined]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    del y
    x.grad = None
    return Cost(seconds, sum(kept.values()))


if __name__ == "__main__":
    main()
