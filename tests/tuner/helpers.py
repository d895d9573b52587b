"""Small things that the tests of the tuner share."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from goat_ds import GoatConfig
from goat_ds.tuner.layer import FROZEN, GoatExperts
from tests.models import causal_lm, token_ids

SMALL: dict[str, Any] = {"r": 8, "num_experts": 4, "top_k": 2}


def goat(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """Put a small GOAT adapter on a model, a tiny LLaMA unless another is given."""
    return get_peft_model(model or causal_lm(), GoatConfig(**(SMALL | settings)))


def experts_of(model: nn.Module) -> list[GoatExperts]:
    """List the experts of every adapted layer and adapter."""
    return [module for module in model.modules() if isinstance(module, GoatExperts)]


def disturb(model: nn.Module, *, seed: int = 1) -> None:
    """Move every trainable tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter)


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Evaluate a model on tokens."""
    model.eval()
    with torch.no_grad():
        return model(**(inputs or {"input_ids": token_ids(2, 9)})).logits


def fixed_tensors(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield what must never train: the experts' starts and the base."""
    for name, parameter in model.named_parameters():
        if ".goat_experts." not in name or name.rpartition(".")[2] in FROZEN:
            yield name, parameter
