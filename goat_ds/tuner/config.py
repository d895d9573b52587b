"""What a GOAT adapter is made of: every number METHOD needs, as PEFT stores it in ``adapter_config.json``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft import PeftConfig

from goat_ds.errors import raise_if_any
from goat_ds.method.routing import Routing
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
    GATED = "gated"
    """As a frozen low-rank term that takes the token's own gates: the start is the base, whatever the router says."""


OF_LOW_RANK = ("r", "scaling", "eta", "lora_alpha", "rho", "adaptive_scale", "residual", "shared_A", "rho_warmup_steps")
"""Settings that say nothing about experts that are whole matrices."""


@dataclass
class GoatConfig(PeftConfig):
    """Settings of one GOAT adapter (arXiv 2502.16894).

    With ``num_experts=1, top_k=1`` the same settings give plain LoRA (``init="zero"``), PiSSA and MiLoRA.

    Args:
        r: Total rank of a layer; every expert has ``r / num_experts``.
        num_experts: Experts of a layer, ``E``.
        routing: How a token chooses its experts: top_k, top_p (the fewest whose probability reaches ``top_p``) or
            threshold (those whose probability reaches the token's own threshold, as AdaMoLE).
        top_k: Experts a token uses, ``k``, with routing top_k; all of them by their probabilities, if it is their
            number.
        top_p: The probability that chosen experts reach together, with routing top_p.
        max_threshold: The highest threshold, with routing threshold; None: 1 over the number of experts to choose
            among.
        shared_experts: The first so many experts are always on, with gate 1; the router chooses among the others.
        temperature: What the router's logits are divided by.
        expert_dropout: Probability that an expert is left out for a token in training; never all of them.
        router_noise: Standard deviation of the noise on the router's logits in training.
        shared_A: One ``A`` of ``r / num_experts`` rows for all experts, as HydraLoRA; needs init zero.
        full_rank: Whole copies of the weight as experts, what a mixture of low-rank ones approximates; needs init
            zero. They have neither rank nor scale, and take as much memory as so many trained weights.
        init: Where in the spectrum the experts start: goat, goat_mini, pissa, milora, pissa_milora or zero; or, with
            one expert, on the leading part of ``W = Q R`` (olora).
        scaling: Formula of ``s``: theory, alpha or rslora.
        eta: Ratio of the learning rates, full fine-tuning to LoRA (``theory``).
        lora_alpha: Numerator of ``alpha`` and ``rslora``.
        rho: Divisor of the singular values the experts start from.
        adaptive_scale: GOAT-s: expert e gets ``s sqrt(sum_0 / sum_e)``, by the sums of its singular values.
        residual: ``lowrank`` keeps the start's mean contribution as a frozen term, ``fold`` subtracts it from the base,
            ``gated`` takes the start's contribution off by the token's own gates.
        rho_warmup_steps: Steps over which the residual goes from gated to lowrank, so that training begins at the base
            exactly; whoever trains calls ``GoatModel.set_step`` before each step.
        balance_coef: Weight of the balance loss, summed over layers.
        dropout: Probability that an input of the experts is zeroed; the router sees all of it, and so does the
            residual, unless it is gated.
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
    routing: Routing = Routing.TOP_K
    top_p: float = 0.25
    max_threshold: float | None = None
    shared_experts: int = 0
    temperature: float = 1.0
    expert_dropout: float = 0.0
    router_noise: float = 0.0
    shared_A: bool = False
    full_rank: bool = False
    rho_warmup_steps: int = 0
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
        self.routing = Routing(self.routing)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _problems(self) -> Iterator[str]:
        enums = (("init", Init), ("scaling", Scaling), ("residual", Residual), ("routing", Routing))
        for name, values in enums:
            if getattr(self, name) not in list(values):
                yield f"{name} ({getattr(self, name)}) must be one of {', '.join(values)}"
        if not_numbers := list(self._not_numbers()):
            yield from not_numbers
            return
        for name in ("r", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                yield f"{name} ({getattr(self, name)}) must be at least 1"
        if self.num_experts >= 1 and self.r % self.num_experts and self.full_rank is not True:
            yield f"num_experts ({self.num_experts}) must divide r ({self.r})"
        yield from self._choice_problems()
        for name in ("eta", "lora_alpha", "rho", "temperature"):
            if not getattr(self, name) > 0:
                yield f"{name} ({getattr(self, name)}) must be above 0"
        for name in ("balance_coef", "router_noise", "rho_warmup_steps"):
            if not getattr(self, name) >= 0:
                yield f"{name} ({getattr(self, name)}) must be at least 0"
        for name in ("dropout", "expert_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} ({getattr(self, name)}) must be in [0, 1)"
        if type(self.full_rank) is not bool:
            yield f"full_rank ({self.full_rank!r}) must be true or false"
        yield from self._whole_problems() if self.full_rank is True else self._start_problems()
        if type(self.routed) is not bool:
            yield f"routed ({self.routed!r}) must be true or false"
        elif not self.routed and not self.deferred:
            yield "routed (False) is what a trained mixture becomes and cannot be started; use True"
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

    def _choice_problems(self) -> Iterator[str]:
        """Yield why tokens could not choose experts so."""
        if not 0 <= self.shared_experts <= max(0, self.num_experts - 2):
            yield (
                f"shared_experts ({self.shared_experts}) must be at least 0 and leave 2 of num_experts "
                f"({self.num_experts}) to choose among"
            )
        elif self.routing == Routing.TOP_K and self.top_k > self.num_choices:
            but = f" less shared_experts ({self.shared_experts})" if self.shared_experts else ""
            yield f"top_k ({self.top_k}) must be at most num_experts ({self.num_experts}){but}"
        if not 0 < self.top_p <= 1:
            yield f"top_p ({self.top_p}) must be above 0 and at most 1"
        if self.max_threshold is not None and not 0 < self.max_threshold <= 1:
            yield f"max_threshold ({self.max_threshold}) must be above 0 and at most 1"

    def _start_problems(self) -> Iterator[str]:
        """Yield what does not go with where experts start."""
        if self.init in (Init.ZERO, Init.OLORA) and self.adaptive_scale:
            yield f"adaptive_scale needs a start with singular values, and init is {self.init}"
        if self.init == Init.OLORA and self.num_experts != 1:
            yield f"init (olora) starts one expert, and num_experts is {self.num_experts}; use 1, or another init"
        if type(self.shared_A) is not bool:
            yield f"shared_A ({self.shared_A!r}) must be true or false"
        elif self.shared_A and self.init != Init.ZERO:
            yield (
                f"shared_A is one A for all experts, and init {self.init} starts each on directions of its own; use "
                "init zero"
            )
        if self.rho_warmup_steps and (self.init == Init.ZERO or self.residual != Residual.LOWRANK):
            yield (
                f"rho_warmup_steps ({self.rho_warmup_steps}) leads from residual gated to lowrank, and here it is "
                f"{self.residual} with init {self.init}; use residual lowrank with another init than zero, or leave it "
                "out"
            )

    def _whole_problems(self) -> Iterator[str]:
        """Yield what does not go with experts that are whole matrices."""
        if self.init != Init.ZERO:
            yield f"full_rank starts every expert as a copy of the weight, and init is {self.init}; use init zero"
        for name in OF_LOW_RANK:
            if (value := getattr(self, name)) != getattr(type(self), name):
                yield f"{name} ({value}) has no effect with full_rank, whose experts have no factors; leave it out"
        if self.routed is False:
            yield "routed (False) is the dense form of low-rank experts, and full_rank has none; use True"

    def _not_numbers(self) -> Iterator[str]:
        for name in ("r", "num_experts", "top_k", "shared_experts", "rho_warmup_steps"):
            if type(getattr(self, name)) is not int:
                yield f"{name} ({getattr(self, name)!r}) must be a whole number"
        for name in (
            *("eta", "lora_alpha", "rho", "balance_coef", "dropout"),
            *("top_p", "temperature", "expert_dropout", "router_noise"),
        ):
            if type(getattr(self, name)) not in (int, float):
                yield f"{name} ({getattr(self, name)!r}) must be a number"
        if type(self.max_threshold) not in (int, float, type(None)):
            yield f"max_threshold ({self.max_threshold!r}) must be a number, or null"

    @property
    def expert_rank(self) -> int:
        """``d``, the rank of one expert."""
        return self.r // self.num_experts

    @property
    def num_choices(self) -> int:
        """How many experts a router chooses among: all but the shared ones."""
        return self.num_experts - self.shared_experts

    @property
    def num_rows_A(self) -> int:
        """Rows of ``A``."""
        return self.expert_rank if self.shared_A else self.r

    @property
    def takes_gates(self) -> bool:
        """Whether the residual takes the token's own gates, and stands in differences."""
        return self.residual is Residual.GATED and self.init.decomposes

    @property
    def has_threshold(self) -> bool:
        """Whether a layer has a threshold to train beside its router."""
        return self.routing is Routing.THRESHOLD and self.num_experts > 1 and self.routed

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
