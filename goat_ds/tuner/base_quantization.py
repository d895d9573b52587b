"""How a base is quantised that an adapter is trained on, and which of its layers are."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from goat_ds.tuner.quantized import (
    BLOCK_SIZES,
    DTYPES,
    QUANT_TYPES,
    Packing,
    QuantizedLinear,
    is_linear4bit,
)

_PACKING_NAMES = tuple(field.name for field in fields(Packing))
_DTYPE_NAMES = ("dtype", "weight_dtype", "compute_dtype")


@dataclass(frozen=True, kw_only=True)
class BaseQuantization:
    """How a base was quantised that an adapter was trained on; stands in ``adapter_config.json``."""

    packing: Packing
    """The same for all layers."""
    dtype: str
    """Of the model around, that of its activations: float32, bfloat16 or float16."""
    weight_dtype: str
    """Of the weights before they were packed."""
    compute_dtype: str
    """What weights were unpacked to."""
    kept: tuple[str, ...] = ()
    """Names of linear layers, or of modules around them, that were not quantised, besides the output layer."""

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self.packing) | {
            **{name: getattr(self, name) for name in _DTYPE_NAMES},
            "kept": list(self.kept),
        }

    def bitsandbytes_settings(self) -> dict[str, Any]:
        """Return what transformers' ``BitsAndBytesConfig`` needs to quantise a base like this one.

        It has no word for ``block_size``, which is bitsandbytes' own 64 there.
        """
        settings: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.packing.quant_type,
            "bnb_4bit_use_double_quant": self.packing.double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
        }
        if self.kept:
            settings["llm_int8_skip_modules"] = ["lm_head", *self.kept]
        return settings

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BaseQuantization":
        """Read what ``to_dict`` gave; ``problems`` must have found none."""
        packing = Packing(**{name: values[name] for name in _PACKING_NAMES})
        return cls(packing=packing, **{name: values[name] for name in _DTYPE_NAMES}, kept=tuple(values["kept"]))

    @classmethod
    def problems(cls, values: Any) -> Iterator[str]:
        """Yield why ``values`` is not what ``to_dict`` gives."""
        names = (*_PACKING_NAMES, *_DTYPE_NAMES, "kept")
        if not isinstance(values, dict) or values.keys() != set(names):
            yield f"base_quantization ({values}) must be null or hold {', '.join(names)}"
        elif values["quant_type"] not in QUANT_TYPES or values["block_size"] not in BLOCK_SIZES:
            yield f"base_quantization ({values}) has a quant_type or block_size that bitsandbytes does not know"
        elif any(values[name] not in DTYPES for name in _DTYPE_NAMES):
            yield f"base_quantization ({values}): {', '.join(_DTYPE_NAMES)} must be of {', '.join(DTYPES)}"
        elif type(values["double_quant"]) is not bool or not isinstance(values["kept"], list):
            yield f"base_quantization ({values}): double_quant must be true or false, and kept a list"


def layers_to_quantize(model: nn.Module, *, kept: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of a model that become 4-bit.

    That is all of them but the output layer, those to be kept, those that the architecture itself keeps in fp32, those
    that PEFT saves whole, and those with a forward of their own, which 4-bit layers would not have.

    Args:
        model: A base, with or without weights, with or without adapters.
        kept: Names of layers, or of modules around them.

    Yields:
        The path, as it was before PEFT wrapped any layer, and the layer itself.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {id(module) for module in head.modules()} if isinstance(head, nn.Module) else set()
    for path, module in list(model.named_modules()):
        is_saved_whole = ".modules_to_save." in path or ".original_module" in path
        if _is_plainly_linear(module) and id(module) not in left_out and not is_saved_whole:
            plain = plain_path(path)
            if not any(is_named(plain, name) for name in kept) and not is_kept_in_fp32(model, plain):
                yield plain, module


def is_named(path: str, name: str) -> bool:
    """Whether a name, of one or several parts, is among the parts of a path."""
    return f".{name}." in f".{path}."


def _is_plainly_linear(module: nn.Module) -> bool:
    plain = (nn.Linear.forward, Conv1D.forward, QuantizedLinear.forward)
    return isinstance(module, nn.Linear | Conv1D) and (type(module).forward in plain or is_linear4bit(module))


def is_kept_in_fp32(model: nn.Module, path: str) -> bool:
    """Whether an architecture of transformers keeps a module or parameter in fp32, whatever dtype it is loaded in."""
    lists = (getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return any(is_named(path, name) for names in lists for name in names)


def plain_path(path: str) -> str:
    """Return a layer's path as it was before PEFT wrapped it."""
    return path.replace(".base_layer", "").replace(".original_module", "")
