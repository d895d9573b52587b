"""The 4-bit base in shards: every layer's bytes are made by one rank, or read from a base that has them, and split.

    unquantised:  mapped files, or shards ──► one rank ──► whole weight ──► (start) ──► bytes ──► shards on all ranks
    quantised:    mapped files ──► one layer's bytes ──► shards on all ranks

A mapped file is address space, not memory, so what a rank holds grows from nothing to its 4-bit shard. Files that
cannot be mapped as they are, because their dtype is not that of the run or transformers assembles parameters from
several tensors, are loaded into 16-bit shards first. Either way a rank holds at most two whole layers beside its
shards.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from goat_ds.base.inspect import Base
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError
from goat_ds.tuner.base_quantization import (
    BaseQuantization,
    is_kept_in_fp32,
    is_named,
    layers_to_quantize,
)
from goat_ds.tuner.model import linear_shape
from goat_ds.tuner.quantized import QuantizedLinear, from_bitsandbytes, is_4bit
from goat_ds.zero import ds_config, partition
from goat_ds.zero.partition import Cut

FILE_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""What safetensors calls the dtypes of a run."""


class Recipe(NamedTuple):
    """How a base becomes 4-bit: its packing, and what shards the bytes."""

    quantization: BaseQuantization
    cut: Cut


def recipe_of(quantization: BaseQuantization | None, *, engine_config: dict[str, Any]) -> Recipe | None:
    """Return the recipe for a filled DeepSpeed config; None where nothing becomes 4-bit."""
    if quantization is None:
        return None
    return Recipe(quantization, partition.cutter(engine_config, stage=ds_config.stage(engine_config)))


class QuantizedBytes(NamedTuple):
    """What the 4-bit layers of a base hold: values in all, bytes on all ranks and here; values that are not 4-bit."""

    num_layers: int
    num_values: int
    bytes_everywhere: int
    bytes_here: int
    num_other_values: int

    def __str__(self) -> str:
        bits = 8 * self.bytes_everywhere / max(self.num_values, 1)
        return (
            f"4-bit base: {self.num_layers} layers, {self.num_values / 1e6:.1f} M values at {bits:.2f} bits, "
            f"{self.bytes_here / 2**20:.1f} MiB on this rank; {self.num_other_values / 1e6:.1f} M values are not 4-bit"
        )


def misfits(skeleton: nn.Module, quantization: BaseQuantization) -> Iterator[str]:
    """Yield which settings of a 4-bit base do not fit a model; needs no weights."""
    wanted = dict(layers_to_quantize(skeleton, kept=()))
    for name in quantization.kept:
        if not any(is_named(path, name) for path in wanted):
            known = sorted({path.rpartition(".")[2] for path in wanted})
            yield f"keep_in_high_precision ({name}) matches no layer that becomes 4-bit; these are: {', '.join(known)}"
    chosen = list(layers_to_quantize(skeleton, kept=quantization.kept))
    if not chosen:
        yield f"keep_in_high_precision ({' '.join(quantization.kept)}) leaves no layer to become 4-bit; keep fewer"
    weights = Counter(id(layer.weight) for _, layer in chosen)
    if shared := [path for path, layer in chosen if weights[id(layer.weight)] > 1]:
        yield f"load_in_4bit: {', '.join(shared)} share one weight; name them in keep_in_high_precision"
    block_size = quantization.packing.block_size
    sizes: dict[tuple[int, int], str] = {}
    for path, layer in chosen:
        sizes.setdefault(linear_shape(layer), path)
    for (out_features, in_features), path in sizes.items():
        if out_features * in_features % block_size:
            yield (
                f"bnb_4bit_blocksize ({block_size}) does not divide {path}: {out_features} x {in_features}; use a "
                "smaller one, or name the layer in keep_in_high_precision"
            )


def to_bytes_on_all(base: nn.Module, bytes_N: Tensor | None, *, owner: int, recipe: Recipe) -> QuantizedLinear:
    """Return the 4-bit layer that takes a linear layer's place, and free the weight that it had. A collective.

    Args:
        base: The unquantised layer.
        bytes_N: What the owner packed; None on the other ranks.
        owner: The rank that has the bytes.
        recipe: How they are packed and sharded.
    """
    weight: Any = base.weight
    shape, quantization = linear_shape(base), recipe.quantization
    num_bytes = quantization.packing.num_bytes(shape[0] * shape[1])
    everywhere_N = torch.empty(num_bytes, dtype=torch.uint8, device=ranks.device()) if bytes_N is None else bytes_N
    torch.distributed.broadcast(everywhere_N, src=owner)
    layer = QuantizedLinear(
        everywhere_N,
        packing=quantization.packing,
        shape=shape,
        bias=base.bias,  # type: ignore[arg-type]
        dtype=weight.dtype,
        compute_dtype=getattr(torch, quantization.compute_dtype),
        weight_dtype=weight.dtype,
    )
    recipe.cut(layer.weight, torch.uint8)
    partition.release(weight)
    return layer


def can_be_mapped(base: Base, *, dtype: torch.dtype) -> bool:
    """Whether a base's files hold its parameters as they are needed, so that loading it copies nothing.

    Args:
        base: What it is.
        dtype: Of the run.
    """
    if base.is_4bit:
        return True
    mapping = get_model_conversion_mapping(base.skeleton())
    assembled = any(isinstance(entry, WeightConverter) for entry in mapping)
    # What the config says of the dtype need not be what the files hold.
    return not assembled and set(_dtypes_on_disk(base.name)) == {FILE_DTYPES[dtype]}


def _dtypes_on_disk(model: str) -> Iterator[str]:
    """Yield the dtypes of the tensors in a base's safetensors files; none where it has other files."""
    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(model, SAFE_WEIGHTS_NAME, **quiet):
        paths = [single]
    elif index := cached_file(model, SAFE_WEIGHTS_INDEX_NAME, **quiet):
        paths, _ = get_checkpoint_shard_files(model, index)
    else:
        return
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield file.get_slice(name).get_dtype()


def load_mapped(
    base: Base,
    *,
    quantization: BaseQuantization | None,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str,
    engine_config: dict[str, Any],
) -> Any:
    """Map a base's files into memory and shard all but what waits to become 4-bit. A collective.

    transformers would give every rank the whole of a quantised base, and 16-bit shards of any other.

    Args:
        base: What it is.
        quantization: What will become 4-bit, and so stays mapped until then; None where bitsandbytes has done it.
        dtype: Of the run.
        compute_dtype: Dtype that stored 4-bit weights are multiplied in.
        attention: Settled attention code.
        engine_config: The filled DeepSpeed config.
    """
    # Without a place, transformers would move a quantised base to the GPU, whole.
    place: dict[str, Any] = {} if quantization else {"device_map": {"": "cpu"}}
    model: Any = AutoModelForCausalLM.from_pretrained(
        base.name,
        config=copy.deepcopy(base.config),
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        **place,
    )
    if not ranks.is_same_everywhere(_fingerprint(model)):
        raise ConfigError(f"model ({base.name}) is not the same on every node; copy the same files to all")
    cut = partition.cutter(engine_config, stage=ds_config.stage(engine_config))
    if quantization is None:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and is_4bit(layer):
                quantized = from_bitsandbytes(layer, dtype=dtype, compute_dtype=compute_dtype)
                model.set_submodule(path, quantized)
                cut(quantized.weight, torch.uint8)
        # From here on it is a model like any other.
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = model.is_loaded_in_4bit = False
    waiting: set[int] = set()
    if quantization is not None:
        waiting = {id(layer.weight) for _, layer in layers_to_quantize(model, kept=quantization.kept)}
    done = {id(layer.weight) for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in waiting | done:
            # transformers leaves what stands beside stored 4-bit weights in the dtype of the files.
            casts = parameter.is_floating_point() and not is_kept_in_fp32(model, name)
            cut(parameter, dtype if casts else parameter.dtype)
    return model


def _fingerprint(base: nn.Module) -> str:
    """Return a name for the values of a model, from a few of each parameter; ranks of several nodes have files each."""
    digest = hashlib.sha256()
    for parameter in base.parameters():
        values = parameter.detach().view(-1)
        some = values[:: max(1, len(values) // 64)].contiguous()
        digest.update(some.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def measure(model: nn.Module) -> QuantizedBytes:
    """Count what the 4-bit layers of a model hold."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    weights = [layer.weight for layer in layers]
    ids = {id(weight) for weight in weights}
    return QuantizedBytes(
        num_layers=len(layers),
        num_values=sum(layer.out_features * layer.in_features for layer in layers),
        bytes_everywhere=sum(partition.full_shape(weight).numel() for weight in weights),
        bytes_here=sum(partition.resident_bytes(weight) for weight in weights),
        num_other_values=sum(
            partition.full_shape(parameter).numel()
            for name, parameter in model.named_parameters()
            if id(parameter) not in ids and "goat_experts" not in name
        ),
    )
