"""From the command line and a YAML file to the settings of a run.

``--config run.yaml`` holds any of them; the command line wins. A run of the embedded demo starts from the demo's own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from goat_ds import demo
from goat_ds.arguments import Parsed, mistakes, parse_known
from goat_ds.errors import ConfigError, first_line
from goat_ds.method.routing import Routing
from goat_ds.method.scaling import Scaling
from goat_ds.method.spectrum import Init
from goat_ds.train.config import GOAT_FLAGS, MAX_TIMEOUT_MINUTES, MIN_TIMEOUT_MINUTES, REQUIRED, TrainConfig
from goat_ds.train.methods import Method, without_effect
from goat_ds.tuner.config import Residual

SEVERAL_RANKS = """\
one process; several ranks, one a GPU, are started by a launcher:
  deepspeed --num_gpus 8 --module goat_ds.cli.train FLAGS
  torchrun --nproc-per-node 8 -m -- goat_ds.cli.train FLAGS
"""


def parse(arguments: Sequence[str], *, required: Sequence[str] = REQUIRED) -> TrainConfig:
    """Read the command line and the YAML file it names.

    Args:
        arguments: Of the command line.
        required: Settings whose absence is reported with the mistakes, unless the embedded demo's are taken.

    Raises:
        ConfigError: unknown flags or keys, flags that other flags make useless; then wrong numbers as well. Or a value
            of the wrong type.
    """
    config_file = _value_of("config", arguments)
    content = _read_yaml(Path(config_file)) if config_file else {}
    given = [*_arguments_of(content, given=arguments), *arguments]
    config, unknown_words = _parsed(given)
    if config.is_demo:
        config, _ = _parsed([*_arguments_of(_read_yaml(demo.settings()), given=given), *given])
    unknown_keys = [
        f"config: {config_file}: {key} is not a setting; see --help" for key in content if key not in _NAMES
    ]
    found = [*unknown_keys, *mistakes(unknown_words), *_useless(config, _names_in(given))]
    # With a timeout that is none, ranks could not even meet to look for more.
    if found or not MIN_TIMEOUT_MINUTES <= config.timeout_minutes <= MAX_TIMEOUT_MINUTES:
        raise ConfigError(*found, *config.problems(required=required))
    return config


def _parsed(arguments: Sequence[str]) -> Parsed[TrainConfig]:
    return parse_known(
        TrainConfig,
        arguments,
        program="goat-ds train",
        description="Train GOAT experts on a frozen base model.",
        epilog=SEVERAL_RANKS,
    )


def _useless(config: TrainConfig, given: set[str]) -> Iterator[str]:
    """Yield which of the given flags other flags make useless."""
    of_adapter = {name: _shown(getattr(config, name)) for name in GOAT_FLAGS if name in given}
    if config.peft_config is not None:
        for name, value in {"method": str(config.method), **of_adapter}.items():
            if name in given:
                yield f"{name} ({value}) has no effect beside peft_config ({config.peft_config}); leave it out"
    elif config.method is not Method.GOAT:
        yield from without_effect(config.method, of_adapter)
    else:
        yield from _useless_in_goat(config, given)
    for name in ("bnb_4bit_blocksize", "bnb_4bit_use_double_quant", "keep_in_high_precision"):
        if name in given and not config.load_in_4bit:
            yield f"{name} ({_shown(getattr(config, name))}) has no effect without load_in_4bit; give both or neither"
    if config.allow_changed and config.resume is None:
        yield "allow_changed has no effect without resume; give both or neither"


def _useless_in_goat(config: TrainConfig, given: set[str]) -> Iterator[str]:
    theory = config.scaling is Scaling.THEORY
    if theory and "lora_alpha" in given:
        yield f"lora_alpha ({config.lora_alpha}) has no effect with scaling theory; use scaling alpha or rslora, or eta"
    if not theory and "eta" in given:
        yield f"eta ({config.eta}) has no effect with scaling {config.scaling}; use scaling theory, or lora_alpha"
    if config.init in (Init.ZERO, Init.OLORA) and "rho" in given:
        yield f"rho ({config.rho}) has no effect with init {config.init}; use another init, or leave rho out"
    if config.init is Init.ZERO and "residual" in given and config.residual is not Residual.LOWRANK:
        yield f"residual ({config.residual}) has no effect with init zero; use another init, or leave residual out"
    yield from _useless_to_route(config, given)
    if "balance_coef" in given and config.balance_coef:
        if config.num_experts == 1:
            yield f"balance_coef ({config.balance_coef}) has no effect with num_experts 1; set it to 0"
        elif _keeps_all(config):
            yield (
                f"balance_coef ({config.balance_coef}) has no effect with top_k {config.top_k}, which keeps every "
                "expert for every token; set it to 0"
            )


def _keeps_all(config: TrainConfig) -> bool:
    is_soft = config.routing is Routing.TOP_K and config.top_k == config.num_experts - config.shared_experts
    return is_soft and not config.expert_dropout


def _useless_to_route(config: TrainConfig, given: set[str]) -> Iterator[str]:
    """Yield which of the given flags about the router do nothing."""
    for name, routing in (
        ("top_k", Routing.TOP_K),
        ("top_p", Routing.TOP_P),
        ("max_threshold", Routing.THRESHOLD),
    ):
        if name in given and config.routing is not routing:
            yield (
                f"{name} ({getattr(config, name)}) has no effect with routing {config.routing}; use routing {routing}, "
                f"or leave {name} out"
            )
    if config.num_experts == 1:
        for name in ("routing", "temperature", "expert_dropout", "router_noise", "shared_A", "rho_warmup_steps"):
            if name in given and getattr(config, name) != getattr(TrainConfig(), name):
                yield f"{name} ({_shown(getattr(config, name))}) has no effect with num_experts 1; leave it out"


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_NAMES = frozenset(f.name for f in dataclasses.fields(TrainConfig))


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """Return the value of a flag without parsing the others."""
    value = None
    for place, argument in enumerate(arguments):
        if argument == f"--{name}":
            value = arguments[place + 1] if place + 1 < len(arguments) else None
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config ({path}) cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config ({path}) must hold 'name: value' lines")
    return content


def _arguments_of(content: dict[str, Any], *, given: Sequence[str]) -> list[str]:
    """Turn settings of a YAML file into command-line arguments, without the flags that the command line has itself."""
    on_command_line = _names_in(given)
    arguments = []
    for key, value in content.items():
        if key in _NAMES and value is not None and key not in on_command_line:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{key}", *map(str, values)]
    return arguments


def _names_in(arguments: Sequence[str]) -> set[str]:
    """Name the settings that a command line holds."""
    words = (a.partition("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a.startswith("--"))
    return {word.removeprefix("no_") for word in words}
