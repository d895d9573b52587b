"""What a GOAT adapter is made of: every number METHOD needs, as PEFT stores it in ``adapter_config.json``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft import PeftConfig

from goat_ds.errors import raise_if_any
from goat_ds.method.scaling import Scaling
from goat_ds.method.spectrum import Init
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.tuner.fingerprint import BaseFingerprint


class GoatPeftType(StrEnum):
    """PEFT's own enum of methods is closed; a member of another one with the same behaviour keys its mappings."""

    GOAT = "GOAT"


class Residual(StrEnum):
    """Where ``W_res``, the start's mean contribution, is taken off."""

    LOWRANK = "lowrank"
    """As a frozen low-rank term beside the base, which stays bit-identical."""
    FOLD = "fold"
    """Subtracted once, in fp32, from the base weight, as the paper writes it."""


@dataclass
class GoatConfig(PeftConfig):
    """Settings of one GOAT adapter (arXiv 2502.16894).

    With ``num_experts=1, top_k=1`` the same settings give plain LoRA (``init="zero"``), PiSSA and MiLoRA.

    Args:
        r: Total rank of a layer; every expert has ``r / num_experts``.
        num_experts: Experts of a layer, ``E``.
        top_k: Experts a token uses, ``k``.
        init: Where in the spectrum the experts start: goat, goat_mini, pissa, milora, pissa_milora or zero; or, with
            one expert, on the leading part of ``W = Q R`` (olora).
        scaling: Formula of ``s``: theory, alpha or rslora.
        eta: Ratio of the learning rates, full fine-tuning to LoRA (``theory``).
        lora_alpha: Numerator of ``alpha`` and ``rslora``.
        rho: Divisor of the singular values the experts start from.
        adaptive_scale: GOAT-s: expert e gets ``s sqrt(sum_0 / sum_e)``, by the sums of its singular values.
        residual: ``lowrank`` keeps the start's mean contribution as a frozen term, ``fold`` subtracts it from the base.
        balance_coef: Weight of the balance loss, summed over layers.
        dropout: Probability that an input of the experts is zeroed; router and residual see all of it.
        target_modules: Names or a regular expression of the layers to adapt; None means all linear layers.
        exclude_modules: Names or a regular expression of layers to leave out.
        modules_to_save: Other modules to train and save whole, such as a classification head.
        layers_to_transform: Indices of the blocks to adapt; None means all.
        layers_pattern: Name of the list of blocks, where PEFT does not guess it.
        base_quantization: How the base was quantised that the adapter was trained on, as
            ``quantized.BaseQuantization`` writes it; None: not at all. Recorded when experts start.
        routed: False once the mixture was replaced by its dense form, in which ``A`` serves every token without a
            router (``method.dense_fit``): such an adapter is dense. It can be loaded but not started.
        base_fingerprint: The content of that base, as ``fingerprint.BaseFingerprint`` has it; None: unknown, as where
            it was stored in 4 bits. Recorded when experts start.
        deferred: Leave the factors empty when the layers are made, because they come from an adapter file or from
            shared decomposition. Always true in a saved config, so that loading never repeats an SVD.
    """

    r: int = 32
    num_experts: int = 8
    top_k: int = 2
    init: Init = Init.GOAT
    scaling: Scaling = Scaling.THEORY
    eta: float = 1.0
    lora_alpha: float = 64.0
    rho: float = 10.0
    adaptive_scale: bool = False
    residual: Residual = Residual.LOWRANK
    balance_coef: float = 1e-3
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_quantization: dict[str, Any] | None = None
    routed: bool = True
    base_fingerprint: dict[str, str] | None = None
    deferred: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check every field at once.

        Raises:
            ConfigError: one line a problem.
        """
        super().__post_init__()
        self.peft_type = GoatPeftType.GOAT
        raise_if_any(self._problems())
        self.init, self.scaling, self.residual = Init(self.init), Scaling(self.scaling), Residual(self.residual)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _problems(self) -> Iterator[str]:
        for name, values in (("init", Init), ("scaling", Scaling), ("residual", Residual)):
            if getattr(self, name) not in list(values):
                yield f"{name} ({getattr(self, name)}) must be one of {', '.join(values)}"
        if not_numbers := list(self._not_numbers()):
            yield from not_numbers
            return
        for name in ("r", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                yield f"{name} ({getattr(self, name)}) must be at least 1"
        if self.num_experts >= 1 and self.r % self.num_experts:
            yield f"num_experts ({self.num_experts}) must divide r ({self.r})"
        if self.top_k > self.num_experts:
            yield f"top_k ({self.top_k}) must be at most num_experts ({self.num_experts})"
        for name in ("eta", "lora_alpha", "rho"):
            if not getattr(self, name) > 0:
                yield f"{name} ({getattr(self, name)}) must be above 0"
        if not self.balance_coef >= 0:
            yield f"balance_coef ({self.balance_coef}) must be at least 0"
        if not 0 <= self.dropout < 1:
            yield f"dropout ({self.dropout}) must be in [0, 1)"
        if type(self.routed) is not bool:
            yield f"routed ({self.routed!r}) must be true or false"
        elif not self.routed and not self.deferred:
            yield "routed (False) is what a trained mixture becomes and cannot be started; use True"
        if self.init == Init.ZERO and self.adaptive_scale:
            yield "adaptive_scale needs a start with singular values, and init is zero"
        if self.init == Init.OLORA and self.num_experts != 1:
            yield f"init (olora) starts one expert, and num_experts is {self.num_experts}; use 1, or another init"
        if self.init == Init.OLORA and self.adaptive_scale:
            yield "adaptive_scale needs a start with singular values, and init is olora"
        if self.layers_pattern is not None and self.layers_to_transform is None:
            yield "layers_pattern is set and layers_to_transform is not"
        is_pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_pattern and self.layers_to_transform is not None:
            yield "layers_to_transform does nothing beside a regular expression in target_modules; write it there"
        if self.base_quantization is not None:
            yield from BaseQuantization.problems(self.base_quantization)
        if self.base_fingerprint is not None:
            yield from BaseFingerprint.problems(self.base_fingerprint)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str) and (reason := _pattern_problem(pattern)):
                yield f"{name} ({pattern}) is not a regular expression: {reason}; mend it, or give a list of names"

    def _not_numbers(self) -> Iterator[str]:
        for name in ("r", "num_experts", "top_k"):
            if type(getattr(self, name)) is not int:
                yield f"{name} ({getattr(self, name)!r}) must be a whole number"
        for name in ("eta", "lora_alpha", "rho", "balance_coef", "dropout"):
            if type(getattr(self, name)) not in (int, float):
                yield f"{name} ({getattr(self, name)!r}) must be a number"

    @property
    def expert_rank(self) -> int:
        """``d``, the rank of one expert."""
        return self.r // self.num_experts

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ``adapter_config.json`` holds them; a saved adapter is complete, so it is deferred."""
        values = super().to_dict()
        return values | {"deferred": True, **{k: str(v) for k, v in values.items() if isinstance(v, StrEnum)}}


def _pattern_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
