"""A trained model in memory, as it computed in training, and a dense form beside it. Needs no DeepSpeed.

Both are adapters of one base: "default" is what was trained, "dense" what will be written, a plain low-rank adapter.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from goat_ds.distributed import ranks
from goat_ds.export.adapter_file import Adapter
from goat_ds.export.base_tensors import BaseTensor, base_tensors, trained_ties
from goat_ds.export.dequantize import MergeBase, initial_is_packed
from goat_ds.export.stored_base import StoredBase
from goat_ds.method.scaling import Scaling
from goat_ds.method.spectrum import Factors, Init
from goat_ds.tuner.config import GoatConfig, Residual
from goat_ds.tuner.layer import GoatExperts, GoatLayer
from goat_ds.tuner.model import ADAPTER_NAME, GoatModel, named_experts

TRAINED, DENSE = ADAPTER_NAME, "dense"


def base_model(adapter: Adapter, base: StoredBase, tensors: list[BaseTensor], *, dtype: torch.dtype) -> PreTrainedModel:
    """Build the base from the tensors that an export would write, on this process's device, in eval mode."""
    config = copy.deepcopy(base.skeleton.config)
    if base.is_4bit:
        del config.quantization_config
    if trained_ties(adapter, base.skeleton):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    state = {item.key: item.tensor.read() for item in tensors}
    model: PreTrainedModel = type(base.skeleton).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.to(ranks.device()).eval()  # type: ignore[arg-type]


@dataclass
class TrainedModel:
    """What was trained, in memory."""

    model: nn.Module
    adapter: Adapter

    @cached_property
    def layers(self) -> dict[str, GoatLayer]:
        """The adapted layers by path in the base."""
        return {_path_in_base(item.path): item.layer for item in named_experts(self.model, TRAINED)}

    def experts(self, name: str = TRAINED) -> dict[str, GoatExperts]:
        """Return one adapter's experts by path in the base."""
        return {path: layer.goat_experts[name] for path, layer in self.layers.items()}  # type: ignore[misc]

    @contextmanager
    def computing_with(self, name: str) -> Iterator[nn.Module]:
        """Yield the model with one of its two adapters active."""
        for layer in self.layers.values():
            layer.set_adapter([name])
        try:
            yield self.model
        finally:
            for layer in self.layers.values():
                layer.set_adapter([TRAINED])

    @torch.no_grad()
    def set_dense(self, deltas: Mapping[str, Factors]) -> None:
        """Put a dense form beside what was trained: ``ΔW = B A`` of layers by their path, in fp32."""
        for path, layer in self.layers.items():
            layer.goat_experts[DENSE] = _plain_low_rank(layer.goat_experts[TRAINED], deltas[path])  # type: ignore[arg-type]


def _plain_low_rank(trained: GoatExperts, delta: Factors) -> GoatExperts:
    """Make one expert that every token uses, scaled by 1."""
    rank = len(delta.a_RI)
    config = GoatConfig(
        r=rank,
        num_experts=1,
        top_k=1,
        init=Init.ZERO,
        scaling=Scaling.ALPHA,
        lora_alpha=float(rank),
        balance_coef=0.0,
        deferred=True,
    )
    plain = GoatExperts(
        config,
        name=trained.name,
        in_features=trained.in_features,
        out_features=trained.out_features,
        like=torch.empty(0, dtype=torch.float32, device=trained.A.device),
        signal=trained.signal,
    )
    plain.A.copy_(delta.a_RI)
    plain.B.copy_(delta.b_OR)
    plain.ready = True
    return plain


def load_trained(adapter: Adapter, base: StoredBase, merge_base: MergeBase, *, dtype: torch.dtype) -> TrainedModel:
    """Load what was trained, with its experts, for inference.

    A start that was folded into an unquantised base stands beside it here, as in what will be written.

    Args:
        adapter: The experts.
        base: What they were trained on.
        merge_base: Which weights of the base they stand on.
        dtype: That the model computes in.
    """
    packed = initial_is_packed(adapter, merge_base)
    tensors = base_tensors(adapter, base, merge_base, folded=packed)
    # The base as it is built here has no name, no packed layer, and the modules that were trained whole.
    values = adapter.config.to_dict() | dict.fromkeys(
        ("base_model_name_or_path", "base_quantization", "base_fingerprint", "modules_to_save")
    )
    beside = Residual.LOWRANK if adapter.is_folded else adapter.config.residual
    config = GoatConfig(**values | {"residual": Residual.FOLD if packed else beside})
    whole = base_model(adapter, base, tensors, dtype=dtype)
    with warnings.catch_warnings():
        # An output layer that shares the embedding's weight has its own once it is merged.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
        routed: Any = get_peft_model(whole, config, autocast_adapter_dtype=False)
    for item in named_experts(routed, TRAINED):
        _fill(item.experts, {name: t.read() for name, t in adapter.layers[_path_in_base(item.path)].items()})
    tuner: GoatModel = routed.base_model
    tuner.requires_grad_(False)
    return TrainedModel(routed.eval(), adapter)


@torch.no_grad()
def _fill(experts: GoatExperts, tensors: dict[str, Tensor]) -> None:
    for name, parameter in experts.named_parameters():
        parameter.copy_(tensors[name])
    experts.ready = True


def _path_in_base(path: str) -> str:
    return path.removeprefix("base_model.model.")
