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


def gates_up_to_p(probs: list[Tensor], top_p: float) -> list[Tensor]:
    """One token's gates: of the most probable experts, as few as reach p together."""
    kept: list[int] = []
    for e in sorted(range(len(probs)), key=lambda e: -float(probs[e].detach())):
        kept.append(e)
        if sum(float(probs[i].detach()) for i in kept) >= top_p:
            break
    total = sum(probs[e] for e in kept)
    return [probs[e] / total if e in kept else torch.zeros_like(probs[e]) for e in range(len(probs))]


def gates_above(probs: list[Tensor], threshold: Tensor) -> list[Tensor]:
    """One token's gates: how much every probability exceeds the threshold (AdaMoLE's layer, expert by expert)."""
    over = [p - threshold if float((p - threshold).detach()) >= 0 else torch.zeros_like(p) for p in probs]
    total = sum(over)
    return [value / total for value in over]


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
    routing: str = "top_k",
    top_p: float = 0.25,
    threshold: Tensor | None = None,
    threshold_bias: Tensor | None = None,
    max_threshold: float = 0.0,
    shared_experts: int = 0,
    temperature: float = 1.0,
    mean_share: float = 1.0,
    noise: Tensor | None = None,
    left_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer, token by token and expert by expert: its output and its balance loss L_b."""
    num_experts, d = len(scales), b.shape[1] // len(scales)
    num_choices = num_experts - shared_experts
    shares_a = len(a) < b.shape[1]
    real = mask if mask is not None else [True] * len(x)
    outputs = []
    choices = [0.0] * num_choices
    prob_sums: list[Tensor] = [torch.zeros((), dtype=torch.float64) for _ in range(num_choices)]
    for t, (token, is_real) in enumerate(zip(x, real, strict=True)):
        y = weight @ token
        gates: list[Tensor] = [torch.ones((), dtype=torch.float64)] * num_experts
        if router is not None:
            there = [e for e in range(num_choices) if left_out is None or not bool(left_out[t, e])]
            logits = {e: router[e] @ token + (0 if noise is None else noise[t, e]) for e in there}
            found, probs, kept = gates_of_token([logits[e] / temperature for e in there], min(top_k, len(there)))
            tau = torch.zeros((), dtype=torch.float64)
            if routing == "top_p":
                found = gates_up_to_p(probs, top_p)
                kept = [bool(g > 0) for g in found]
            if routing == "threshold":
                tau = max_threshold * torch.sigmoid(threshold[0] @ token + threshold_bias[0])
                found = gates_above(probs, tau)
                kept = [bool(p >= tau) for p in probs]
            chosen = [torch.zeros((), dtype=torch.float64)] * num_choices
            for place, e in enumerate(there):
                chosen[e] = found[place]
                if is_real:
                    choices[e] += float(kept[place])
                    prob_sums[e] = prob_sums[e] + probs[place]
            for e in range(num_choices):
                if is_real:
                    prob_sums[e] = prob_sums[e] - tau
            gates = [torch.ones((), dtype=torch.float64)] * shared_experts + chosen
        for e in range(num_experts):
            rows = slice(e * d, (e + 1) * d)
            y = y + scales[e] * gates[e] * (b[:, rows] @ (a[slice(0, d) if shares_a else rows] @ token))
            if a0 is not None and b0 is not None:
                mean = 1.0 if e < shared_experts else 1 / num_choices
                counts = mean_share * mean + (1 - mean_share) * gates[e]
                y = y - scales[e] * counts * (b0[:, rows] @ (a0[rows] @ token))
        outputs.append(y)
    num_real = max(sum(real), 1)
    per_token = 1.0 if routing == "threshold" else sum(choices) / num_real
    balance = torch.zeros((), dtype=torch.float64)
    for e in range(num_choices):
        f = num_choices / (per_token * num_real) * choices[e] if choices[e] else 0.0
        balance = balance + f * prob_sums[e] / num_real
    return torch.stack(outputs), balance
