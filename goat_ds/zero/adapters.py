"""What is trained on a base: GOAT experts, an adapter of another PEFT method, or, without one, every weight.

The engine, checkpoints and the optimizer see all of them through the functions of this file.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import Tensor, nn

from goat_ds.errors import ConfigError, first_line, raise_if_any
from goat_ds.tuner.config import GoatConfig, GoatPeftType
from goat_ds.tuner.model import ADAPTER_NAME, GoatModel
from goat_ds.zero.decompose import seed_of

NEEDS_MORE: Mapping[str, str] = {
    "ADALORA": "a call of its own after every step",
    "POLY": "the number of every record's task",
    "XLORA": "adapters that were trained before",
}
"""PEFT's methods that a loop over text alone cannot train, and what they need."""
LORA_STARTS = ("True", "False", "gaussian", "orthogonal")
"""LoRA's starts that neither look at data or at the base's weights, nor change them."""
STARTS_IN_THE_BASE = {"pissa": "--method pissa", "olora": "--method olora", "loftq": "--load_in_4bit"}
"""LoRA's starts that change the base's weights, and what to use instead."""
OF_PLAIN_LORA = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
    "fan_in_fan_out", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config",
})  # fmt: skip
"""Settings of LoRA that this loop trains by; any other makes a variant, some of which need a loss of their own."""


class Rates(NamedTuple):
    """Peak learning rates: of everything, of the factors B as a multiple of it, and of routers (None: the same)."""

    learning_rate: float
    ratio_B: float = 1.0
    router: float | None = None


def problems(adapter: PeftConfig | None, *, stage: int, is_4bit: bool) -> Iterator[str]:
    """Yield why a method cannot be trained here, one line each.

    Args:
        adapter: Its config; None: every weight is trained.
        stage: ZeRO's.
        is_4bit: Whether the base is, or becomes, 4-bit.
    """
    if isinstance(adapter, GoatConfig):
        return
    if adapter is None:
        if is_4bit:
            yield "method (full) trains every weight, and 4-bit weights cannot be trained; leave load_in_4bit out"
        return
    name = _type_of(adapter)
    if adapter.is_prompt_learning or name == "ADAPTION_PROMPT":
        yield f"peft_type ({name}) puts tokens before every text, for which packs have no place; use another method"
    if name in NEEDS_MORE:
        yield f"peft_type ({name}) needs {NEEDS_MORE[name]}, which this trainer has not; use another method"
    if isinstance(adapter, LoraConfig):
        yield from _lora_problems(adapter)
    is_plain_lora = isinstance(adapter, LoraConfig) and not adapter.use_dora
    if stage == 3 and not is_plain_lora:
        yield (
            f"{_named(adapter)} may read weights of the base that ZeRO-3 has sharded; use ds_configs/zero2.json, or "
            "method lora, rslora or lora_plus"
        )
    if is_4bit and not is_plain_lora:
        yield (
            f"{_named(adapter)} may read weights of the base, which are 4-bit here; use an unquantised base, or method "
            "lora, rslora or lora_plus"
        )


def _named(adapter: PeftConfig) -> str:
    is_dora = isinstance(adapter, LoraConfig) and adapter.use_dora
    return "method (dora)" if is_dora else f"peft_type ({_type_of(adapter)})"


def _type_of(adapter: PeftConfig) -> str:
    return str(getattr(adapter.peft_type, "value", adapter.peft_type))


def _lora_problems(adapter: LoraConfig) -> Iterator[str]:
    start = str(adapter.init_lora_weights)
    kind = start.lower().partition("_niter")[0]
    if kind not in STARTS_IN_THE_BASE and start not in LORA_STARTS:
        yield (
            f"init_lora_weights ({start}) looks at data, or at the base's weights, in a way that this trainer has no "
            "call for; use true, gaussian or orthogonal"
        )
    if kind in STARTS_IN_THE_BASE:
        yield (
            f"init_lora_weights ({start}) changes the base's weights, so that no checkpoint could be read without "
            f"changing them once more; use {STARTS_IN_THE_BASE[kind]}"
        )
    for setting in dataclasses.fields(LoraConfig):
        if setting.name in OF_PLAIN_LORA:
            continue
        value, missing = getattr(adapter, setting.name), dataclasses.MISSING
        default = setting.default if setting.default_factory is missing else setting.default_factory()
        if value != default:
            yield (
                f"{setting.name} ({value}) makes a variant of LoRA that this trainer has no test of; leave it out, or "
                "train it with PEFT itself"
            )


def config_from(values: Mapping[str, Any]) -> PeftConfig:
    """Return the config of a PEFT method from what ``adapter_config.json`` holds.

    Raises:
        ConfigError: it names no method, or settings that the method does not have, or wrong ones.
    """
    kinds: dict[Any, Any] = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    named = values.get("peft_type")
    if named == GoatPeftType.GOAT:
        raise ConfigError("peft_config: peft_type (GOAT) has flags of its own here; use --method goat and those")
    kind = kinds.get(named) if isinstance(named, str) else None
    if kind is None:
        known = ", ".join(sorted(str(getattr(name, "value", name)) for name in kinds))
        raise ConfigError(f"peft_config: peft_type ({values.get('peft_type')}) must be one of {known}")
    known_fields = set(kind.__dataclass_fields__)
    raise_if_any(f"peft_config: {name} is no setting of {named}" for name in sorted(values.keys() - known_fields))
    if (task := values.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ConfigError(f"peft_config: task_type ({task}) is not CAUSAL_LM, and this trains causal language models")
    settings = {name: value for name, value in values.items() if name != "peft_type"}
    # What a saved adapter says of its own use and origin is not this run's.
    settings |= {"task_type": "CAUSAL_LM", "inference_mode": False, "base_model_name_or_path": None, "revision": None}
    try:
        adapter = kind(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft_config: {named} does not take these settings: {first_line(error)}") from error
    if getattr(adapter, "target_modules", "") is None:
        adapter.target_modules = "all-linear"
    assert isinstance(adapter, PeftConfig)
    return adapter


def rehearse(skeleton: nn.Module, adapter: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Put an adapter of another method than GOAT on a model without weights, to see whether it fits.

    Returns:
        The shapes of the adapter's tensors, by their names in its file.

    Raises:
        ConfigError: no layer matches, or PEFT refuses the settings.
    """
    try:
        fitted = _fit(skeleton, adapter, low_cpu_mem_usage=True)
    except ConfigError as error:
        if "meta" in str(error):
            raise ConfigError(
                f"{_named(adapter)} cannot be put on a model without weights, so that nothing of it can be checked "
                "before a run; use another method"
            ) from error
        raise
    name, trained = _named(adapter), {name for name, _ in trained_tensors(fitted)}
    try:
        found = get_peft_model_state_dict(fitted, state_dict=dict(stored_tensors(fitted)))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name} could not be saved by this trainer: {first_line(error)}; use another") from error
    if not trained & found.keys():
        raise ConfigError(f"{name} saves what it trains under other names, and could not be resumed; use another")
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def attach(model: Any, adapter: PeftConfig, *, dtype: torch.dtype, seed: int) -> PeftModel:
    """Put an adapter of another method than GOAT on the base; every rank draws the same values.

    Args:
        model: The base, sharded or not; if it becomes 4-bit, it is so already.
        adapter: The method's config.
        dtype: Of what is trained.
        seed: Of what is drawn.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "adapter"))
        fitted = _fit(model, adapter)
    for parameter in fitted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return fitted


def _fit(model: Any, adapter: PeftConfig, **how: Any) -> PeftModel:
    try:
        fitted = get_peft_model(
            model, copy.deepcopy(adapter), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False, **how
        )
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ConfigError(f"{_named(adapter)}: {first_line(error)}") from error
    assert isinstance(fitted, PeftModel)
    return fitted


def base_of(model: Any) -> Any:
    """Return the base of a model that may have an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def goat_of(model: nn.Module) -> GoatModel | None:
    """Return the GOAT tuner of a model; None where another method is trained."""
    tuner = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, GoatModel) else None


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what is trained, by its name in the adapter's file; in the model, where there is no adapter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield _name_in_file(model, name), parameter


def _name_in_file(model: nn.Module, name: str) -> str:
    if not isinstance(model, PeftModel):
        return name
    tuner: Any = model.base_model
    return str(tuner._remove_adapter_name_from_key(name, ADAPTER_NAME))


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that a checkpoint's model or adapter folder is made of, by name in the model.

    PEFT then chooses among those of an adapter, by every name that a shared one has; a model's own come once each.
    """
    prefix = getattr(model.base_model, "prefix", "") if isinstance(model, PeftModel) else ""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if prefix and (tensor.requires_grad or prefix in name):
            yield name, tensor
        elif not prefix and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Return what is trained in groups of one learning rate each, those of ``learning_rate`` itself first."""
    by_rate: dict[float, list[nn.Parameter]] = {rates.learning_rate: []}
    for name, parameter in trained_tensors(model):
        part, rate = _part_of(name), rates.learning_rate
        if part == "B":
            rate *= rates.ratio_B
        elif part == "router" and rates.router is not None:
            rate = rates.router
        by_rate.setdefault(rate, []).append(parameter)
    # DeepSpeed has no place for an empty group.
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items() if parameters]


def rate_problems(names: Iterable[str], rates: Rates) -> Iterator[str]:
    """Yield which rates nothing has among an adapter's tensors, by their names in its file."""
    if rates.ratio_B != 1.0 and not any(_part_of(name) == "B" for name in names):
        yield f"lr_ratio_B ({rates.ratio_B}) has no effect: the method has no factor B; leave it out"


def _part_of(name: str) -> str:
    """Return which part of an adapter a tensor is, by its name in the adapter's file: B, router, or the rest."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf.endswith("_B"):
        return "B"
    return "router" if leaf.startswith(("goat_router", "goat_threshold")) else "rest"
