"""Write the linear layers of a 4-bit base as what their weights stand for, so that a reader needs no bitsandbytes.

    unquantised base:  weight ──► dtype of training ──► (fold) ──► packed and unpacked, as in training ──► written
    4-bit base:        stored bytes with their statistics ──► unpacked ──────────────────────────────────► written

Shape letters: O out features, I in features, N bytes.
"""

from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from goat_ds.errors import ConfigError, ExportError
from goat_ds.export.adapter_file import Adapter
from goat_ds.export.stored_base import StoredBase
from goat_ds.export.tensors import StoredTensor
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize
from goat_ds.tuner.quantized import Packing, bitsandbytes, pack, unpack


class MergeBase(StrEnum):
    """Which weights of the base an exact export writes."""

    DEQUANT_W4 = "dequant_w4"
    """What the 4-bit weights stand for, in the adapter's dtype; layers that were not quantised stay as they are."""
    W16 = "w16"
    """The base's own, unquantised."""


def choose_weights(adapter: Adapter, base: StoredBase, wanted: MergeBase | None) -> MergeBase:
    """Return the weights to write: those asked for, else those the adapter was trained on.

    Raises:
        ConfigError: nothing says how an unquantised base would have been quantised.
        ExportError: the base does not have them, or is packed otherwise than in training.
    """
    trained = adapter.quantization
    choice = wanted or (MergeBase.DEQUANT_W4 if trained else MergeBase.W16)
    if base.is_4bit:
        _check_stored(adapter, base, choice)
    elif choice is MergeBase.DEQUANT_W4 and trained is None:
        raise ConfigError(
            f"merge_base (dequant_w4) asks for 4-bit weights, and nothing says how base ({base.path}) would have been "
            f"quantised: {adapter.path} was trained on an unquantised base; use --merge_base w16"
        )
    return choice


def _check_stored(adapter: Adapter, base: StoredBase, choice: MergeBase) -> None:
    if choice is MergeBase.W16:
        raise ExportError(
            f"base ({base.path}) is stored in 4 bits and has no unquantised weights for merge_base (w16); give the "
            "unquantised base with --base PATH, or use --merge_base dequant_w4"
        )
    if adapter.is_folded:
        raise ExportError(
            f"residual (fold) was subtracted before quantisation, and base ({base.path}) was stored in 4 bits without "
            "it; give the unquantised base with --base PATH"
        )
    found = {packing_of_stored(base, name) for name in base.tensors if base.is_packed(name)}
    if adapter.quantization and found - {adapter.quantization.packing}:
        raise ExportError(
            f"base ({base.path}) is packed as {' and as '.join(sorted(map(str, found)))}, and {adapter.path} was "
            f"trained on {adapter.quantization.packing}; give the base of training, or the unquantised one, with "
            "--base PATH"
        )


def initial_is_packed(adapter: Adapter, merge_base: MergeBase) -> bool:
    """Whether the weights of ``merge_base`` hold ``-W_res`` already: 4-bit ones were packed with it."""
    return adapter.is_folded and merge_base is MergeBase.DEQUANT_W4


def packing_of_stored(base: StoredBase, key: str) -> Packing:
    """Return how a tensor of a 4-bit base is packed, without reading its statistics."""
    blob = next(tensor for name, tensor in base.statistics(key).items() if name.startswith("quant_state."))
    about = bitsandbytes().utils.unpack_tensor_to_dict(blob.read())
    return Packing(
        quant_type=about["quant_type"], block_size=about["blocksize"], double_quant="nested_blocksize" in about
    )


def dequantized_names(adapter: Adapter, base: StoredBase, key_of: dict[str, str]) -> Iterator[str]:
    """Yield the parameters that ``dequant_w4`` writes as what their 4 bits stand for.

    Args:
        adapter: Says which layers were quantised in training, where the base is unquantised.
        base: Its own 4-bit tensors count, where it has any.
        key_of: Names on disk of the base's parameters.
    """
    if base.is_4bit:
        yield from (name for name, key in key_of.items() if base.is_packed(key))
    elif adapter.quantization:
        for path, _ in layers_to_quantize(base.skeleton, kept=adapter.quantization.kept):
            yield f"{path}.weight"


def dequantized(name: str, key: str, adapter: Adapter, base: StoredBase) -> StoredTensor:
    """Return a linear layer's weight as what its 4 bits stand for, in the adapter's dtype; computed when it is read.

    Args:
        name: Of the parameter.
        key: On disk.
        adapter: Says how its base was quantised and what was folded into it.
        base: Unquantised or 4-bit.
    """
    layer = base.skeleton.get_submodule(name.rpartition(".")[0])
    read_OI = partial(_unpacked_OI if base.is_4bit else _packed_again_OI, name, key, adapter, base)
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    return StoredTensor(adapter.dtype, shape, partial(_as_stored, read_OI, isinstance(layer, Conv1D)))


def _as_stored(read_OI: partial[Tensor], transposed: bool) -> Tensor:
    weight_OI = read_OI()
    return weight_OI.T if transposed else weight_OI


def _packed_again_OI(name: str, key: str, adapter: Adapter, base: StoredBase) -> Tensor:
    path, trained = name.rpartition(".")[0], adapter.quantization
    assert trained is not None
    # A copy, because what was read is the file itself.
    weight_OI = base.tensors[key].read().to(getattr(torch, trained.weight_dtype), copy=True)
    if isinstance(base.skeleton.get_submodule(path), Conv1D):
        weight_OI = weight_OI.T
    if adapter.is_folded and path in adapter.layers:
        adapter.fold_into_(weight_OI, path)
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    bytes_N = pack(weight_OI, trained.packing)
    return unpack(bytes_N, trained.packing, shape=shape, dtype=_compute_dtype(trained)).to(adapter.dtype)


def _unpacked_OI(name: str, key: str, adapter: Adapter, base: StoredBase) -> Tensor:
    functional: Any = bitsandbytes().functional
    statistics = {name: tensor.read() for name, tensor in base.statistics(key).items()}
    state = functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    state.dtype = _compute_dtype(adapter.quantization) if adapter.quantization else adapter.dtype
    weight_OI: Tensor = functional.dequantize_4bit(base.tensors[key].read(), state)
    return weight_OI.to(adapter.dtype)


def _compute_dtype(quantization: BaseQuantization) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, quantization.compute_dtype)
    return dtype
