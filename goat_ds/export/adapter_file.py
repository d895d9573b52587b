"""Find a trained adapter and read it: its settings, its tensors by layer, and that nothing is missing or left over.

Shape letters: O out features, I in features, E experts, R total rank.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goat_ds.errors import ConfigError, ExportError
from goat_ds.export.tensors import StoredTensor, stored_tensors
from goat_ds.manifest import MANIFEST_NAME, damages
from goat_ds.method.scaling import expert_scale
from goat_ds.method.spectrum import Factors, add_residual_
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.tuner.config import GoatConfig, GoatPeftType, Residual

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
TENSOR_PREFIX = "goat_"
ARITHMETIC = (
    "r", "num_experts", "top_k", "init", "scaling", "eta", "lora_alpha", "adaptive_scale", "residual", "routed",
    "routing", "top_p", "max_threshold", "shared_experts", "temperature", "shared_A", "full_rank",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A GOAT adapter on disk."""

    path: Path
    """The folder with ``adapter_config.json``."""
    step: int | None
    """Of the training run, where the folder says so."""
    config: GoatConfig
    """Its settings."""
    layers: dict[str, dict[str, StoredTensor]]
    """By module path in the base model: ``A``, ``B``, ``A0``, ``B0``, ``router``, ``s`` …; as the settings ask. Whole
    experts are ``D`` and ``router``."""
    whole: dict[str, StoredTensor]
    """Parameters of ``modules_to_save``, by name in the base model; they replace the base's."""

    @property
    def is_folded(self) -> bool:
        """Whether training subtracted the start's contribution from the base weights."""
        return self.config.init.decomposes and self.config.residual is Residual.FOLD

    @property
    def is_routed(self) -> bool:
        """Whether what an expert adds depends on the token; else the adapter is dense."""
        return self.config.routed and self.config.num_experts > 1

    def in_features(self, path: str) -> int:
        """Return ``I`` of one layer."""
        return self._read_by_x(path).shape[-1]

    def _read_by_x(self, path: str) -> StoredTensor:
        """Return a tensor of one layer that multiplies its input."""
        return self.layers[path]["D" if self.config.full_rank else "A"]

    @property
    def quantization(self) -> BaseQuantization | None:
        """How the base was quantised in training; None: not at all."""
        values = self.config.base_quantization
        return None if values is None else BaseQuantization.from_dict(values)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model in training: as recorded with a 4-bit base, else that of the experts."""
        if self.quantization is not None:
            recorded: torch.dtype = getattr(torch, self.quantization.dtype)
            return recorded
        return self._read_by_x(next(iter(self.layers))).dtype

    def scale(self, path: str) -> float:
        """Return ``s`` of one layer; with GOAT-s it is the tensor ``s`` that counts."""
        return expert_scale(
            self.config.scaling,
            in_features=self.in_features(path),
            expert_rank=self.config.expert_rank,
            eta=self.config.eta,
            lora_alpha=self.config.lora_alpha,
        )

    def fold_into_(self, weight_OI: Tensor, path: str) -> None:
        """Subtract the residual ``W_res = Σ_e s_e c_e B0_e A0_e`` of one layer from its base weight, as in training."""
        factors = {name: tensor.read() for name, tensor in self.layers[path].items() if name in ("A0", "B0", "s")}
        add_residual_(
            weight_OI,
            Factors(factors["A0"], factors["B0"]),
            scale=self.scale(path),
            scale_E=factors.get("s"),
            num_experts=self.config.num_experts,
            shared_experts=self.config.shared_experts,
            times=-1,
        )


def read_adapter(checkpoint: Path) -> Adapter:
    """Read an adapter folder, that of a checkpoint folder, or that of the newest checkpoint of a run.

    Raises:
        ConfigError: there is no adapter at ``checkpoint``.
        ExportError: the adapter is not one of GOAT, or not whole: every problem at once.
    """
    path = find_adapter(checkpoint)
    if (path.parent / MANIFEST_NAME).is_file() and (found := list(damages(path.parent, below=path.name))):
        raise ExportError("\n".join(found))
    config = _read_config(path / CONFIG_NAME)
    if not (path / WEIGHTS_NAME).is_file():
        raise ExportError(f"{path} has {CONFIG_NAME} but no {WEIGHTS_NAME}")
    layers, whole, stray = _sorted_tensors(stored_tensors(path / WEIGHTS_NAME), config)
    problems = [*_layer_problems(layers, config), *_whole_problems(whole, stray, config)]
    if problems:
        raise ExportError("\n".join([f"{path / WEIGHTS_NAME} is not a whole adapter:", *problems]))
    return Adapter(path=path, step=_step(path.parent), config=config, layers=layers, whole=whole)


def read_low_rank(checkpoint: Path, *, mode: str) -> Adapter:
    """Return an adapter as ``read_adapter`` does, if its experts are low-rank products.

    Args:
        checkpoint: As there.
        mode: What is to be made of it.

    Raises:
        ConfigError: there is no adapter, or its experts are whole copies of the weights.
        ExportError: it is not one of GOAT, or not whole.
    """
    adapter = read_adapter(checkpoint)
    if adapter.config.full_rank:
        raise ConfigError(
            f"mode ({mode}) is for low-rank experts, and those of {adapter.path} are whole copies of the weights "
            "(full_rank); use mode adapter"
        )
    return adapter


def find_adapter(checkpoint: Path) -> Path:
    """Return the adapter folder that ``checkpoint`` means.

    Raises:
        ConfigError: there is none, or it holds a whole model.
    """
    path = find_trained(checkpoint)
    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(f"checkpoint ({checkpoint}) holds a whole model, and no adapter: {path}")
    return path


def find_trained(checkpoint: Path) -> Path:
    """Return the folder of the adapter, or of the whole model, that ``checkpoint`` means.

    Raises:
        ConfigError: there is none.
    """
    steps = {path: step for path in checkpoint.glob("checkpoint-*") if (step := _step(path)) is not None}
    newest_first = sorted(steps, key=lambda path: steps[path], reverse=True)
    below = [path / name for path in (checkpoint, *newest_first) for name in ("adapter", "model")]
    for folder in (checkpoint, *below):
        if (folder / CONFIG_NAME).is_file() or (folder != checkpoint and (folder / "config.json").is_file()):
            return folder.resolve()
    raise ConfigError(
        f"checkpoint ({checkpoint}) holds neither {CONFIG_NAME}, nor adapter/{CONFIG_NAME}, nor a checkpoint-<step>; "
        "give an adapter folder, a checkpoint folder or the output_dir of a run"
    )


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def _read_config(path: Path) -> GoatConfig:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if values.get("peft_type") != GoatPeftType.GOAT:
        raise ExportError(
            f"{path}: peft_type ({values.get('peft_type')}) is not {GoatPeftType.GOAT}, so this is another method"
        )
    # A default in place of a lost value would export another model than the one trained.
    if lost := [name for name in ARITHMETIC if name not in values]:
        raise ExportError(f"{path} lacks {', '.join(lost)}")
    known = {field.name for field in fields(GoatConfig)}
    return GoatConfig(**{name: value for name, value in values.items() if name in known})


def _sorted_tensors(
    tensors: dict[str, StoredTensor], config: GoatConfig
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor], list[str]]:
    """Sort an adapter file's tensors into layers, parameters of ``modules_to_save``, and what is neither."""
    layers: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    whole: dict[str, StoredTensor] = {}
    stray: list[str] = []
    adapted = {key.rpartition(".")[0] for key in tensors if f".{TENSOR_PREFIX}" in key}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(KEY_PREFIX)
        path, _, leaf = name.rpartition(".")
        if name == key:
            stray.append(key)
        elif key.rpartition(".base_layer.")[0] in adapted:
            # PEFT saves an adapted output layer's frozen weight as well; the base has it.
            continue
        elif leaf.startswith(TENSOR_PREFIX):
            layers[path][leaf.removeprefix(TENSOR_PREFIX)] = tensor
        elif any(f".{module}." in f".{name}" for module in config.modules_to_save or ()):
            whole[name] = tensor
        else:
            stray.append(key)
    return dict(layers), whole, stray


def _layer_problems(layers: dict[str, dict[str, StoredTensor]], config: GoatConfig) -> Iterator[str]:
    if not layers:
        yield f"no {TENSOR_PREFIX}* tensor in it"
    for path, tensors in layers.items():
        expected = _expected_shapes(tensors, config)
        for name in sorted(expected.keys() - tensors.keys()):
            yield f"{path}.{TENSOR_PREFIX}{name} is missing"
        for name in sorted(tensors.keys() - expected.keys()):
            yield f"{path}.{TENSOR_PREFIX}{name} has no place in this adapter ({_settings(config)})"
        for name in sorted(tensors.keys() & expected.keys()):
            if problem := _shape_problem(tensors[name], expected[name]):
                yield f"{path}.{TENSOR_PREFIX}{name} {problem}"


def _expected_shapes(tensors: dict[str, StoredTensor], config: GoatConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.full_rank:
        *_, out_features, in_features = (0, 0, *(tensors["D"].shape if "D" in tensors else ()))
        shapes["D"] = (config.num_experts, out_features, in_features)
    else:
        in_features = tensors["A"].shape[-1] if "A" in tensors and tensors["A"].shape else 0
        out_features = tensors["B"].shape[0] if "B" in tensors and tensors["B"].shape else 0
        shapes |= {"A": (config.num_rows_A, in_features), "B": (out_features, config.r)}
    if config.init.decomposes:
        shapes |= {"A0": shapes["A"], "B0": shapes["B"]}
    if config.num_experts > 1 and config.routed:
        shapes["router"] = (config.num_choices, in_features)
    if config.has_threshold:
        shapes |= {"threshold": (1, in_features), "threshold_bias": (1,)}
    if config.adaptive_scale:
        shapes["s"] = (config.num_experts,)
    return shapes


def _shape_problem(tensor: StoredTensor, expected: tuple[int, ...]) -> str | None:
    if tensor.num_bytes == 0:
        return f"is empty {list(tensor.shape)}: it was saved while its parameter was sharded"
    if tensor.shape != expected:
        return f"is {list(tensor.shape)}, the settings say {list(expected)}"
    return None


def _whole_problems(whole: dict[str, StoredTensor], stray: list[str], config: GoatConfig) -> Iterator[str]:
    for key in stray:
        yield f"{key} is neither a GOAT tensor nor under modules_to_save ({config.modules_to_save})"
    for name, tensor in whole.items():
        if tensor.num_bytes == 0:
            yield f"{name} is empty {list(tensor.shape)}: it was saved while its parameter was sharded"


def _settings(config: GoatConfig) -> str:
    names = ("full_rank", "routed") if config.full_rank else ("adaptive_scale", "routed")
    flags = ", ".join(f"{name} {str(getattr(config, name)).lower()}" for name in names)
    return f"init {config.init}, num_experts {config.num_experts}, {flags}"
