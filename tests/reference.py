"""METHOD, slowly: the paper as float64 loops over tokens, experts and directions. Imports nothing of goat_ds.

Everything that is fast elsewhere is judged by these functions.
"""

import math

import torch
from torch import Tensor


def segment_indices(start: str, *, q: int, num_experts: int, r: int) -> list[list[int]]:
    """The table of starts: which indices of the descending spectrum expert e takes."""
    t, d = q // num_experts, r // num_experts
    table = {
        "goat": lambda e: [e * t + i for i in range(d)],
        "goat_mini": lambda e: [(e + 1) * t - d + i for i in range(d)],
        "pissa": lambda e: [e * d + i for i in range(d)],
        "milora": lambda e: [q - r + e * d + i for i in range(d)],
    }
    if start == "pissa_milora":
        half = (num_experts + 1) // 2
        return [table["pissa"](e) if e < half else table["milora"](e) for e in range(num_experts)]
    return [table[start](e) for e in range(num_experts)]


def scale_of(scaling: str, *, in_features: int, expert_rank: int, eta: float, lora_alpha: float) -> float:
    """The three scales."""
    return {
        "theory": math.sqrt(3 * eta * in_features / expert_rank),
        "alpha": lora_alpha / expert_rank,
        "rslora": lora_alpha / math.sqrt(expert_rank),
    }[scaling]


def start_products(
    weight: Tensor, start: str, *, num_experts: int, r: int, scale: float, rho: float, adaptive: bool
) -> tuple[list[Tensor], list[float]]:
    """For every expert the product B0_e A0_e and its scale s_e (the factors have free signs, their product has not)."""
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    indices = segment_indices(start, q=len(sigma), num_experts=num_experts, r=r)
    sums = [sum(float(sigma[i]) for i in chosen) for chosen in indices]
    scales = [scale * math.sqrt(sums[0] / total) if adaptive else scale for total in sums]
    products = []
    for chosen, scale_e in zip(indices, scales, strict=True):
        product = torch.zeros_like(weight, dtype=torch.float64)
        for i in chosen:
            product += sigma[i] * torch.outer(u[:, i], vh[i]) / (scale_e * rho)
        products.append(product)
    return products, scales


def gates_of_token(logits: list[Tensor], top_k: int) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """One token's gates, probabilities and kept experts."""
    total = sum(torch.exp(z) for z in logits)
    probs = [torch.exp(z) / total for z in logits]
    kept_indices = sorted(range(len(probs)), key=lambda e: -float(probs[e].detach()))[:top_k]
    kept = [e in kept_indices for e in range(len(probs))]
    kept_total = sum(p for p, keep in zip(probs, kept, strict=True) if keep)
    gates = [p / kept_total if keep else torch.zeros_like(p) for p, keep in zip(probs, kept, strict=True)]
    return gates, probs, kept


def layer(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    router: Tensor | None,
    *,
    scales: list[float],
    top_k: int,
    mask: list[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer, token by token and expert by expert: its output and its balance loss L_b."""
    num_experts, d = len(scales), len(a) // len(scales)
    real = mask if mask is not None else [True] * len(x)
    outputs = []
    choices = [0.0] * num_experts
    prob_sums: list[Tensor] = [torch.zeros((), dtype=torch.float64) for _ in range(num_experts)]
    for token, is_real in zip(x, real, strict=True):
        y = weight @ token
        gates: list[Tensor] = [torch.ones((), dtype=torch.float64)]
        if router is not None:
            gates, probs, kept = gates_of_token([router[e] @ token for e in range(num_experts)], top_k)
            for e in range(num_experts):
                if is_real:
                    choices[e] += float(kept[e])
                    prob_sums[e] = prob_sums[e] + probs[e]
        for e in range(num_experts):
            rows = slice(e * d, (e + 1) * d)
            y = y + scales[e] * gates[e] * (b[:, rows] @ (a[rows] @ token))
            if a0 is not None and b0 is not None:
                y = y - scales[e] / num_experts * (b0[:, rows] @ (a0[rows] @ token))
        outputs.append(y)
    num_real = max(sum(real), 1)
    balance = torch.zeros((), dtype=torch.float64)
    for e in range(num_experts):
        f = num_experts / (top_k * num_real) * choices[e]
        balance = balance + f * prob_sums[e] / num_real
    return torch.stack(outputs), balance
