"""Lay out dense weights: base weights with what the experts add, or that alone as a LoRA adapter.

Shape letters: O out features, I in features, R total rank, S rank of what is added.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from goat_ds.export.adapter_file import KEY_PREFIX, WEIGHTS_NAME, Adapter
from goat_ds.export.base_tensors import BaseTensor, base_tensors, trained_ties
from goat_ds.export.dequantize import MergeBase, initial_is_packed
from goat_ds.export.stored_base import StoredBase
from goat_ds.export.tensors import StoredTensor, read_unmapped
from goat_ds.method.dense_fit import dense_factors, gated_factors, merged
from goat_ds.method.spectrum import Factors

DeltaOf = Callable[[str], Factors]
"""Gives ``A [S, I]`` and ``B [O, S]`` of ``ΔW = B A`` for a layer's path."""


class Merge(NamedTuple):
    """What is merged with what."""

    adapter: Adapter
    base: StoredBase
    merge_base: MergeBase
    dtype: torch.dtype | None
    """Of the weights written and the models compared; None: as on disk and as in training."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that models are compared in."""
        return self.dtype or self.adapter.dtype

    @property
    def initial_is_packed(self) -> bool:
        """Whether the weights that are written hold ``-W_res`` already."""
        return initial_is_packed(self.adapter, self.merge_base)

    def delta(self, path: str, dense: Factors) -> Factors:
        """Return a layer's ``ΔW`` in fp32 from its ``A'`` and ``B``, as ``method.dense_fit.gated_factors`` has them."""
        config, place = self.adapter.config, dense.a_RI.device
        start = None
        if config.init.decomposes and not self.initial_is_packed and not config.takes_gates:
            start = self._factors(path, "A0", "B0", place=place)
        scale_R: Tensor | float = self.adapter.scale(path)
        if config.adaptive_scale:
            scale_E = self.adapter.layers[path]["s"].read().to(place, torch.float32)
            scale_R = scale_E.repeat_interleave(len(dense.a_RI) // config.num_experts)
        return dense_factors(
            dense,
            start,
            scale_R=scale_R,
            num_experts=config.num_experts,
            shared_experts=config.shared_experts,
        )

    def stored_delta(self, path: str) -> Factors:
        """Return the ``ΔW`` of a layer that was trained dense."""
        config = self.adapter.config
        start = self._factors(path, "A0", "B0") if config.takes_gates else None
        return self.delta(path, gated_factors(self._factors(path, "A", "B"), start, num_experts=config.num_experts))

    def _factors(self, path: str, a_name: str, b_name: str, *, place: torch.device | None = None) -> Factors:
        tensors = self.adapter.layers[path]
        return Factors(*(tensors[name].read().to(place, torch.float32) for name in (a_name, b_name)))


def dense_tensors(merge: Merge, delta_of: DeltaOf | None = None) -> dict[str, StoredTensor]:
    """Lay out the whole dense checkpoint under the base's own names on disk; a weight is merged when it is read.

    Args:
        merge: What with what.
        delta_of: What is added to each adapted layer; None to know sizes and names only.
    """
    written = {}
    for item in _with_ties_parted(merge):
        path, _, leaf = item.name.rpartition(".")
        dtype = _dtype_of(item.tensor, merge)
        tensor = StoredTensor(dtype, item.tensor.shape, partial(_cast, item.tensor, dtype))
        if path in merge.adapter.layers and leaf == "weight":
            transposed = isinstance(merge.base.skeleton.get_submodule(path), Conv1D)
            read = partial(_merged, item.tensor, dtype, path, delta_of, transposed)
            tensor = StoredTensor(dtype, item.tensor.shape, read)
        written[item.key] = tensor if dtype != item.tensor.dtype or path in merge.adapter.layers else item.tensor
    return written


def _with_ties_parted(merge: Merge) -> list[BaseTensor]:
    """List the base's tensors, and a copy of the embedding for an adapted output layer that shared it."""
    items = base_tensors(merge.adapter, merge.base, merge.merge_base, folded=merge.initial_is_packed)
    by_name = {item.name: item for item in items}
    ties = merge.base.skeleton.all_tied_weights_keys
    shared = [name for path in merge.adapter.layers if (name := f"{path}.weight") not in by_name]
    return [*items, *(by_name[ties[name]]._replace(name=name, key=name) for name in shared)]


def _parts_ties(merge: Merge) -> bool:
    ties = merge.base.skeleton.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    return bool(trained_ties(merge.adapter, merge.base.skeleton)) or any(
        f"{path}.weight" in tied for path in merge.adapter.layers
    )


def _dtype_of(tensor: StoredTensor, merge: Merge) -> torch.dtype:
    return merge.dtype if merge.dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _cast(tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    return tensor.read().to(dtype)


def _merged(tensor: StoredTensor, dtype: torch.dtype, path: str, delta_of: DeltaOf | None, transposed: bool) -> Tensor:
    assert delta_of is not None, "read before it is known what is added"
    weight = read_unmapped(tensor)
    merged_OI = merged(weight.T if transposed else weight, delta_of(path), dtype=dtype)
    return merged_OI.T if transposed else merged_OI


def dense_config(merge: Merge) -> PreTrainedConfig:
    """Return the base's config, changed only where the weights are."""
    config = copy.deepcopy(merge.base.skeleton.config)
    if merge.base.is_4bit:
        del config.quantization_config
    if merge.dtype is not None:
        config.dtype = merge.dtype
    elif merge.merge_base is MergeBase.DEQUANT_W4:
        config.dtype = merge.adapter.dtype
    if _parts_ties(merge):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def write_lora(merge: Merge, delta_of: DeltaOf, folder: Path) -> None:
    """Write ``ΔW`` as PEFT writes a LoRA adapter: ``lora_A [S, I]``, ``lora_B [O, S]``, scaled by 1."""
    tensors, rank = {}, 0
    for path in merge.adapter.layers:
        factors = delta_of(path)
        rank = len(factors.a_RI)
        tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = factors.a_RI.contiguous()
        tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = factors.b_OR.contiguous()
    tensors |= {f"{KEY_PREFIX}{name}": tensor.read() for name, tensor in merge.adapter.whole.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    layers: dict[str, Any] = {path: merge.base.skeleton.get_submodule(path) for path in merge.adapter.layers}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=merge.base.name,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=_target_names(merge.base.skeleton, set(layers)),
        modules_to_save=merge.adapter.config.modules_to_save,
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    config.save_pretrained(str(folder))


def _target_names(skeleton: nn.Module, paths: set[str]) -> list[str]:
    """Name the layers as short as PEFT finds exactly them: by their last names, else by their whole paths."""
    last_names = {path.rpartition(".")[2] for path in paths}
    found = {
        path
        for path, module in skeleton.named_modules()
        if path.rpartition(".")[2] in last_names and isinstance(module, nn.Linear | Conv1D)
    }
    return sorted(last_names if found == paths else paths)
