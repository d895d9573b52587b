"""The model of a run without a weight: every parameter with its shape and dtype, from ``config.json`` alone."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from goat_ds.base.inspect import Base
from goat_ds.precision import dtype_name
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize
from goat_ds.tuner.config import GoatConfig
from goat_ds.tuner.model import ADAPTER_NAME, linear_shape, named_experts
from goat_ds.tuner.quantized import Packing, QuantizedLinear
from goat_ds.zero.waves import cost_of


class Kind(Enum):
    """What a parameter is to a run."""

    BASE = auto()
    FOUR_BIT = auto()
    INITIAL = auto()
    """Frozen tensors of the adapter."""
    TRAINED = auto()


class Held(NamedTuple):
    """One parameter of the model."""

    name: str
    kind: Kind
    num_values: int
    """Bytes of a 4-bit layer are values too."""
    value_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the whole parameter."""
        return self.num_values * self.value_bytes

    def shard_bytes(self, world_size: int) -> int:
        """Of one rank's shard; the last ones are padded."""
        return -(-self.num_values // world_size) * self.value_bytes


@dataclass(frozen=True)
class Skeleton:
    """A model with its adapter on the meta device, and what its parameters are."""

    model: nn.Module
    parameters: tuple[Held, ...]
    weights: dict[str, tuple[int, int]]
    """O and I of the linear layers whose weights are worked on while experts start, by path."""
    packed_bytes: dict[str, int]
    """Of the layers that are 4-bit, by path."""
    becomes_4bit: dict[str, tuple[int, int]]
    """O and I of the layers that become 4-bit while the base is loaded; empty for a base that is stored so."""
    decomposed: frozenset[str]
    """Paths of those that are decomposed."""

    def cost(self, path: str) -> int:
        """Return the cost of the work on a layer's weight while experts start."""
        return cost_of(self.weights[path], decomposes=path in self.decomposed)

    def count(self, *kinds: Kind) -> int:
        """Count values of some kinds of parameters; of all, where none is named."""
        return sum(held.num_values for held in self.parameters if held.kind in (kinds or Kind))

    def num_bytes(self, *kinds: Kind) -> int:
        """Return the bytes of some kinds of parameters, on all ranks together."""
        return sum(held.num_bytes for held in self.parameters if held.kind in kinds)

    @property
    def num_base_values(self) -> int:
        """The base's parameters, unquantised."""
        if not isinstance(self.model, PeftModel):
            return self.count()
        four_bit = sum(m.in_features * m.out_features for m in self.model.modules() if isinstance(m, QuantizedLinear))
        return self.count(Kind.BASE) + four_bit

    @property
    def value_bytes(self) -> int:
        """Bytes of one value in the dtype of the run."""
        return next(held.value_bytes for held in self.parameters if held.kind is Kind.TRAINED)


def build(
    base: Base,
    adapter: PeftConfig | None,
    *,
    dtype: torch.dtype,
    attention: str,
    quantization: BaseQuantization | None,
    compute_dtype: torch.dtype,
) -> Skeleton:
    """Put the adapter on a model without weights; what is wrong with either must have been reported before.

    Args:
        base: What it is.
        adapter: What is trained; None: every weight.
        dtype: Of the weights.
        attention: Attention code.
        quantization: How the base becomes 4-bit; None: it does not, unless it is stored so.
        compute_dtype: What 4-bit weights are unpacked to.
    """
    stored = base.stored_quantization
    if stored is not None:
        quantization = _as_stored(stored, dtype=dtype, compute_dtype=compute_dtype)
    model: Any = base.skeleton(unquantized=True, dtype=dtype, attn_implementation=attention)
    chosen = {} if quantization is None else dict(layers_to_quantize(model, kept=quantization.kept))
    shapes = {path: linear_shape(layer) for path, layer in chosen.items()}
    becomes_4bit = {} if stored is not None else shapes
    if quantization is not None:
        _make_4bit(model, quantization, dtype=dtype)
    packed = {path: model.get_submodule(path).weight.numel() for path in shapes}
    model.config.use_cache = False
    model.train()
    fitted = _fitted(model, adapter)
    starts = {item.path: linear_shape(item.layer.get_base_layer()) for item in named_experts(model, ADAPTER_NAME)}
    decomposes = isinstance(adapter, GoatConfig) and adapter.init.decomposes
    decomposed = frozenset(starts) if decomposes else frozenset()
    for item in named_experts(fitted, ADAPTER_NAME):
        item.experts.ready = True
    return Skeleton(fitted, tuple(_held(fitted)), becomes_4bit | starts, packed, becomes_4bit, decomposed)


def _fitted(model: Any, adapter: PeftConfig | None) -> Any:
    if adapter is None:
        return model
    settings = copy.deepcopy(adapter)
    if isinstance(adapter, GoatConfig):
        settings = GoatConfig(**{**settings.to_dict(), "deferred": True})
    return get_peft_model(
        model, settings, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True
    )


def _as_stored(values: dict[str, Any], *, dtype: torch.dtype, compute_dtype: torch.dtype) -> BaseQuantization:
    """Return how a base is quantised that bitsandbytes has quantised, whose block size is its own 64."""
    packing = Packing(
        quant_type=values.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(values.get("bnb_4bit_use_double_quant", False)),
    )
    kept = values.get("llm_int8_skip_modules") or ()
    return BaseQuantization(
        packing=packing,
        dtype=dtype_name(dtype),
        weight_dtype=dtype_name(dtype),
        compute_dtype=dtype_name(compute_dtype),
        kept=tuple(kept),
    )


def _make_4bit(model: Any, quantization: BaseQuantization, *, dtype: torch.dtype) -> None:
    for path, layer in list(layers_to_quantize(model, kept=quantization.kept)):
        shape = linear_shape(layer)
        num_bytes = quantization.packing.num_bytes(shape[0] * shape[1])
        packed = QuantizedLinear(
            torch.empty(num_bytes, dtype=torch.uint8, device="meta"),
            packing=quantization.packing,
            shape=shape,
            bias=layer.bias,  # type: ignore[arg-type]
            dtype=dtype,
            compute_dtype=getattr(torch, quantization.compute_dtype),
            weight_dtype=dtype,
        )
        model.set_submodule(path, packed)


def _held(model: nn.Module) -> Iterator[Held]:
    bytes_of_4bit = {id(m.weight) for m in model.modules() if isinstance(m, QuantizedLinear)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = Kind.TRAINED
        elif "goat_experts" in name:
            kind = Kind.INITIAL
        else:
            kind = Kind.FOUR_BIT if id(parameter) in bytes_of_4bit else Kind.BASE
        yield Held(name, kind, parameter.numel(), parameter.element_size())
