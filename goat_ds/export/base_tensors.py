"""Lay out an exact export: which tensor of the base, the adapter or both stands under which name.

Names are those of the modules, and the tensors of an adapted layer stand under ``base_layer``: a reader that ignores
the modelling code then finds weights missing and says so, instead of answering as the untrained base.

Shape letters: O out features, I in features, E experts, R total rank.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goat_ds.errors import ExportError
from goat_ds.export.adapter_file import Adapter
from goat_ds.export.dequantize import MergeBase, dequantized, dequantized_names
from goat_ds.export.stored_base import KeyMap, StoredBase
from goat_ds.export.tensors import StoredTensor


def check_fit(adapter: Adapter, skeleton: PreTrainedModel) -> None:
    """Check the adapter's layers and parameters against the base's.

    Raises:
        ExportError: with each that is missing, unknown or of another shape.
    """
    if problems := [*_fit_problems(adapter, skeleton)]:
        raise ExportError("\n".join([f"{adapter.path} does not fit its base, {type(skeleton).__name__}:", *problems]))


def _fit_problems(adapter: Adapter, skeleton: PreTrainedModel) -> Iterator[str]:
    linear = {name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    parameters = skeleton.state_dict()
    for path, tensors in adapter.layers.items():
        expected = (tensors["B"].shape[0], tensors["A"].shape[1])
        if path not in linear:
            yield f"{path} is adapted, and the base has no such linear layer"
        elif (shape := _shape_OI(linear[path])) != expected:
            yield f"{path} is {list(shape)} in the base and {list(expected)} in the adapter"
    for path in sorted(linear.keys() - adapter.layers.keys()):
        if check_target_module_exists(adapter.config, path):
            yield f"{path} is matched by target_modules, and the adapter has no tensors for it"
    for name, tensor in adapter.whole.items():
        if name not in parameters:
            yield f"{name} was trained whole, and the base has no such parameter"
        elif tuple(parameters[name].shape) != tensor.shape:
            yield f"{name} is {list(parameters[name].shape)} in the base and {list(tensor.shape)} in the adapter"


def _shape_OI(layer: nn.Module) -> tuple[int, ...]:
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    return shape[::-1] if isinstance(layer, Conv1D) else shape


def tensors_to_write(adapter: Adapter, base: StoredBase, merge_base: MergeBase) -> dict[str, StoredTensor]:
    """Lay out the whole routed checkpoint by name: the base's tensors, those trained in their place, the experts'.

    Args:
        adapter: What was trained.
        base: On what; the statistics beside its 4-bit tensors are left behind.
        merge_base: Whether weights are written as what their 4 bits stand for.

    Raises:
        ExportError: the base lacks a layer, or holds it only as part of another tensor.
    """
    written = {}
    for item in base_tensors(adapter, base, merge_base):
        # What transformers assembles on reading, such as the experts of a mixture model, keeps its names on disk.
        written[item.key if item.is_converted else _written_name(item.name, adapter)] = item.tensor
    for path in adapter.layers:
        written |= {f"{path}.goat_{name}": tensor for name, tensor in _experts(adapter, path)}
    return written


class BaseTensor(NamedTuple):
    """One tensor of the base as training left it.

    ``name`` is the parameter's in the model, ``key`` the one on disk; ``is_converted`` where the parameter is computed
    from the tensor instead of being it.
    """

    name: str
    key: str
    tensor: StoredTensor
    is_converted: bool


def base_tensors(adapter: Adapter, base: StoredBase, merge_base: MergeBase, *, folded: bool = True) -> list[BaseTensor]:
    """List what the base consists of beside the experts: its own tensors, and those trained whole in their place.

    Args:
        adapter: What was trained.
        base: On what; the statistics beside its 4-bit tensors are left behind.
        merge_base: Whether weights are what their 4 bits stand for.
        folded: Whether an unquantised weight is given with what was folded into it in training, where anything was.

    Raises:
        ExportError: the base lacks a layer, or holds it only as part of another tensor.
    """
    keys = KeyMap(base.skeleton)
    # What the architecture does not read, such as the causal masks in old files, is left behind.
    key_of = {name: key for key in base.tensors if (name := keys.parameter(key))}
    four_bit = set(dequantized_names(adapter, base, key_of)) if merge_base is MergeBase.DEQUANT_W4 else set()
    _check_base_layers(adapter, base, keys, key_of, four_bit)
    _check_whole(adapter, base, key_of)
    found = [
        BaseTensor(name, key, _base_tensor(name, key, adapter, base, four_bit, folded), keys.is_converted(key))
        for key in base.tensors
        if (name := keys.parameter(key))
    ]
    untied = _untied(adapter, base, key_of)
    return [*found, *(BaseTensor(name, name, tensor, False) for name, tensor in untied.items())]


def _check_whole(adapter: Adapter, base: StoredBase, key_of: dict[str, str]) -> None:
    """Check that the base's files have every parameter: transformers would draw a missing one at random."""
    ties, have = base.skeleton.all_tied_weights_keys, {*key_of, *adapter.whole}
    have |= {name for pair in ties.items() if have & set(pair) for name in pair}
    if missing := [name for name, _ in base.skeleton.named_parameters() if name not in have]:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ExportError(f"base ({base.path}) has no tensor for {shown}; give a base that is whole with --base PATH")


def _check_base_layers(
    adapter: Adapter, base: StoredBase, keys: KeyMap, key_of: dict[str, str], four_bit: set[str]
) -> None:
    ties = base.skeleton.all_tied_weights_keys
    for name in dict.fromkeys([*(f"{path}.weight" for path in adapter.layers), *adapter.whole, *sorted(four_bit)]):
        if name in key_of and keys.is_converted(key_of[name]):
            raise ExportError(
                f"{name} was trained or quantised, and the base's files hold it only as part of {key_of[name]}; write "
                "the base as its modules are, with save_pretrained(folder, save_original_format=False), and give "
                "--base folder"
            )
        if name not in key_of and name not in ties:
            raise ExportError(f"base ({base.path}) has no tensor for {name}")
        if name in {*ties, *ties.values()} and name not in adapter.whole and adapter.is_folded:
            raise ExportError(
                f"{name} is tied to the embedding, and residual (fold) changed both in training; exact export needs "
                "residual='lowrank' there"
            )


def _written_name(name: str, adapter: Adapter) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if path in adapter.layers else name


def _base_tensor(
    name: str, key: str, adapter: Adapter, base: StoredBase, four_bit: set[str], folded: bool
) -> StoredTensor:
    path, _, leaf = name.rpartition(".")
    tensor = base.tensors[key]
    if name in adapter.whole:
        return adapter.whole[name]
    if name in four_bit:
        return dequantized(name, key, adapter, base)
    if folded and adapter.is_folded and path in adapter.layers and leaf == "weight":
        transposed = isinstance(base.skeleton.get_submodule(path), Conv1D)
        dtype = adapter.dtype if four_bit else tensor.dtype
        return StoredTensor(dtype, tensor.shape, partial(_fold, tensor, dtype, adapter, path, transposed))
    return tensor


def _fold(weight: StoredTensor, dtype: torch.dtype, adapter: Adapter, path: str, transposed: bool) -> Tensor:
    """Return ``W0 - W_res`` laid out as the base stores its weight, subtracted in fp32 as in training."""
    # A copy, because what was read is the file itself.
    value = weight.read().to(dtype, copy=True)
    adapter.fold_into_(value.T if transposed else value, path)
    return value


def _experts(adapter: Adapter, path: str) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in adapter.layers[path].items():
        if not (adapter.is_folded and name in ("A0", "B0")):
            yield name, tensor


def trained_ties(adapter: Adapter, skeleton: PreTrainedModel) -> list[tuple[str, str]]:
    """List the pairs of tied parameters of which training changed one: ``modules_to_save`` trains a copy."""
    return [pair for pair in skeleton.all_tied_weights_keys.items() if adapter.whole.keys() & set(pair)]


def _untied(adapter: Adapter, base: StoredBase, key_of: dict[str, str]) -> dict[str, StoredTensor]:
    """Return the tensors that the base's files do not hold, because they are tied there and no longer are."""
    return {
        name: adapter.whole.get(name) or base.tensors[key_of[other]]
        for pair in trained_ties(adapter, base.skeleton)
        for name, other in (pair, pair[::-1])
        if name not in key_of
    }
