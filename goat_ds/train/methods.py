"""The methods a run can train by: GOAT, its rivals, and full fine-tuning, in the same loop.

PEFT's own implementation is used wherever there is one that leaves the base as it is. PiSSA, MiLoRA and OLoRA subtract
their start from the base's weights there, so that a checkpoint needs a second decomposition to be read again; here they
are GOAT's layer with one expert, which keeps the same start beside the base and computes the same function.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig

from goat_ds.errors import ConfigError
from goat_ds.method.routing import Routing
from goat_ds.method.scaling import Scaling
from goat_ds.method.spectrum import Init
from goat_ds.tuner.config import GoatConfig, Residual


class Method(StrEnum):
    """What is trained."""

    GOAT = "goat"
    """A mixture of low-rank experts, by all the flags of the adapter (arXiv 2502.16894)."""
    LORA = "lora"
    """One low-rank term, ``lora_alpha / r`` times ``B A`` (arXiv 2106.09685); PEFT's."""
    RSLORA = "rslora"
    """LoRA scaled by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732); PEFT's."""
    DORA = "dora"
    """LoRA on the direction of every row of the weight, and its length (arXiv 2402.09353); PEFT's."""
    PISSA = "pissa"
    """LoRA that starts as the leading r singular directions, taken off the base (arXiv 2404.02948)."""
    MILORA = "milora"
    """LoRA that starts as the trailing r singular directions, taken off the base (arXiv 2406.09044)."""
    OLORA = "olora"
    """LoRA that starts as the first r columns of Q and rows of R, taken off the base (arXiv 2406.01775)."""
    LORA_PLUS = "lora_plus"
    """LoRA whose B learns at a higher rate than A (arXiv 2402.12354); PEFT's."""
    MOLORA = "molora"
    """A soft mixture of LoRAs by a router's probabilities (arXiv 2309.05444)."""
    HYDRALORA = "hydralora"
    """One A and several B, mixed by a router's probabilities (arXiv 2404.19245)."""
    ADAMOLE = "adamole"
    """A mixture of LoRAs in which a threshold of the token's own decides how many count (arXiv 2405.00361)."""
    FULL = "full"
    """Every weight of the model, without an adapter."""
    FULL_MOE = "full_moe"
    """A mixture of whole copies of every adapted weight, for small models; GOAT approximates it (arXiv 2502.16894)."""


class Definition(NamedTuple):
    """How a method is made of the flags of a run."""

    kind: Callable[..., PeftConfig] | None
    """Its config in PEFT; None: no adapter."""
    flags: Mapping[str, str]
    """The flags that count, and what its config calls them."""
    fixed: Mapping[str, Any]
    """What it is known by."""


LAYERS = ("target_modules", "exclude_modules")
LOW_RANK = ("r", "lora_alpha", "dropout", *LAYERS)
LORA_PLUS_RATIO = 16.0
"""The ratio of rates that LoRA+ recommends (arXiv 2402.12354, section 4)."""


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _lora(**fixed: Any) -> Definition:
    names = _same("r", "lora_alpha", *LAYERS) | {"dropout": "lora_dropout"}
    return Definition(LoraConfig, names, {"bias": "none"} | fixed)


def _one_expert(init: Init) -> Definition:
    fixed = {"num_experts": 1, "top_k": 1, "init": init, "rho": 1.0, "balance_coef": 0.0}
    return Definition(GoatConfig, _same(*LOW_RANK), fixed | {"scaling": Scaling.ALPHA, "residual": Residual.LOWRANK})


def _mixture(*flags: str, **fixed: Any) -> Definition:
    of_all = {"init": Init.ZERO, "scaling": Scaling.ALPHA}
    return Definition(GoatConfig, _same("num_experts", *LOW_RANK, *flags), of_all | fixed)


DEFINITIONS: Mapping[Method, Definition] = {
    Method.LORA: _lora(),
    Method.RSLORA: _lora(use_rslora=True),
    Method.DORA: _lora(use_dora=True),
    Method.LORA_PLUS: _lora(),
    Method.PISSA: _one_expert(Init.PISSA),
    Method.MILORA: _one_expert(Init.MILORA),
    Method.OLORA: _one_expert(Init.OLORA),
    Method.MOLORA: _mixture(balance_coef=0.0),
    Method.HYDRALORA: _mixture(balance_coef=0.0, shared_A=True),
    Method.ADAMOLE: _mixture("balance_coef", "max_threshold", routing=Routing.THRESHOLD),
    Method.FULL: Definition(None, {}, {}),
    Method.FULL_MOE: Definition(
        GoatConfig,
        _same("num_experts", "top_k", "balance_coef", "dropout", *LAYERS),
        {"init": Init.ZERO, "full_rank": True},
    ),
}
"""All but GOAT, of which every flag of the adapter counts."""


MIXTURES = (Method.MOLORA, Method.HYDRALORA, Method.ADAMOLE)
"""Methods that are none without a router."""


def adapter_of(method: Method, settings: Any, *, names_of: Callable[[Any], Any]) -> PeftConfig | None:
    """Return the config of a method's adapter as a run's settings have it; None for full fine-tuning.

    Args:
        method: Not GOAT.
        settings: Of the run, with a field for every flag.
        names_of: Returns a list of layers as PEFT takes it.

    Raises:
        ConfigError: one line a problem.
    """
    definition = DEFINITIONS[method]
    if definition.kind is None:
        return None
    values = {theirs: getattr(settings, ours) for ours, theirs in definition.flags.items()} | dict(definition.fixed)
    for name in LAYERS:
        values[name] = names_of(values[name])
    if values["target_modules"] is None:
        values["target_modules"] = "all-linear"
    if method in MIXTURES and values["num_experts"] < 2:
        raise ConfigError(f"num_experts ({values['num_experts']}) makes no mixture; use 2 at least, or method lora")
    if definition.kind is GoatConfig and "top_k" not in values:
        # All experts count where nothing chooses a number of them.
        values["top_k"] = values["num_experts"]
    return definition.kind(task_type="CAUSAL_LM", **values)


def without_effect(method: Method, names: Mapping[str, Any]) -> Iterator[str]:
    """Yield which of the flags of adapters do nothing with a method, one line each.

    Args:
        method: Not GOAT.
        names: The flags that were given, with their values.
    """
    definition = DEFINITIONS[method]
    for name, value in names.items():
        if name in definition.fixed and value == str(definition.fixed[name]):
            continue
        if name in definition.fixed:
            yield f"{name} ({value}) is {definition.fixed[name]} in method {method}; leave it out, or use method goat"
        elif name not in definition.flags:
            yield f"{name} ({value}) has no effect with method {method}; leave it out, or use method goat"
