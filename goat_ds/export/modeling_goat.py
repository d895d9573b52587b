"""A causal language model with GOAT experts beside its linear layers, for use with transformers alone.

GOAT routes every token through a mixture of low-rank experts (arXiv 2502.16894), so no dense weight equals it. This
file travels with the weights: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` builds the
architecture that ``config.goat["architecture"]`` names and puts experts on the layers that ``config.goat["layers"]``
lists with their scales. It imports torch and transformers, nothing else.

Shape letters: T tokens, I in features, O out features, E experts, R total rank, D = R / E.
"""

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# How much of a half-precision input is copied to fp32 at once for the router: on a CPU, and elsewhere.
WIDENED_BYTES, LAUNCHED_BYTES = 2**20, 2**25


class GoatLayer(nn.Module):
    """A linear layer plus its experts: ``W0 x + b + Σ_e s_e g_e(x) B_e A_e x - Σ_e s_e/E B0_e A0_e x``.

    The experts are stacked: expert ``e`` owns rows ``e D … (e+1) D - 1`` of ``A`` and those columns of ``B``. Every
    expert is computed for every token and the unselected ones are multiplied by zero. Without a router, ``g_e`` is 1.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        scale: float,
        r: int,
        num_experts: int,
        top_k: int,
        routed: bool,
        residual: bool,
        adaptive_scale: bool,
    ) -> None:
        super().__init__()
        out_features, in_features = _linear_shape(base_layer)
        self.scale, self.num_experts, self.top_k, self.expert_rank = scale, num_experts, top_k, r // num_experts
        # The base stays a module of its own, under PEFT's name for it, so that a quantizer finds a plain nn.Linear.
        self.base_layer = base_layer
        self.goat_A = nn.Parameter(torch.zeros(r, in_features))
        self.goat_B = nn.Parameter(torch.zeros(out_features, r))
        self.goat_A0 = nn.Parameter(torch.zeros(r, in_features)) if residual else None
        self.goat_B0 = nn.Parameter(torch.zeros(out_features, r)) if residual else None
        self.goat_router = nn.Parameter(torch.zeros(num_experts, in_features)) if routed else None
        self.goat_s = nn.Parameter(torch.zeros(num_experts)) if adaptive_scale else None

    @property
    def weight(self) -> Tensor:
        """The base weight; some architectures look at their layers' dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the experts'."""
        base: Tensor = self.base_layer(x, *args, **kwargs)
        base_TO = base.reshape(-1, base.shape[-1])
        x_TI = x.reshape(-1, x.shape[-1]).to(base.dtype)
        # Under autocast the base has chosen the dtype to compute in; the router's product must stay in fp32.
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self._mixture(x_TI, base_TO).reshape(base.shape)

    def _mixture(self, x_TI: Tensor, base_TO: Tensor) -> Tensor:
        # The same products in the same order as in training, so that the result is the same to the last bit.
        dtype, b_OR = x_TI.dtype, self.goat_B.to(x_TI.dtype)
        u_TR, u0_TR, logits_TE = self._activations(x_TI)
        h_TS = u_TR * self._rank_gates(logits_TE, dtype)
        if u0_TR is None or self.goat_B0 is None:
            return torch.addmm(base_TO, h_TS, b_OR.T)
        h_TS = torch.cat([h_TS, u0_TR * self._residual_gates(dtype)], dim=1)
        return torch.addmm(base_TO, h_TS, torch.cat([b_OR, self.goat_B0.to(dtype)], dim=1).T)

    def _activations(self, x_TI: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return ``A x``, ``A0 x`` and the router's logits, by one product where one can give the logits in fp32."""
        dtype, router_EI = x_TI.dtype, self.goat_router
        is_half = dtype != torch.promote_types(dtype, torch.float32)
        is_apart = router_EI is not None and is_half and not (x_TI.is_cuda and router_EI.dtype == dtype)
        weights = (self.goat_A, self.goat_A0, None if is_apart else router_EI)
        there = [weight.to(dtype) for weight in weights if weight is not None]
        stacked_IG = torch.cat(there).T
        if is_half and router_EI is not None and not is_apart:
            product_TG = torch.mm(x_TI, stacked_IG, out_dtype=torch.float32)
        else:
            product_TG = x_TI @ stacked_IG
        parts = iter(product_TG.split([len(weight) for weight in there], dim=1))
        u_TR, u0_TR, logits_TE = (None if weight is None else next(parts) for weight in weights)
        assert u_TR is not None
        if is_apart:
            logits_TE = self._widened_logits(x_TI)
        return u_TR.to(dtype), None if u0_TR is None else u0_TR.to(dtype), logits_TE

    def _widened_logits(self, x_TI: Tensor) -> Tensor:
        # Logits in bf16 would tie or swap experts whose logits differ by less than 1/256 of their size.
        assert self.goat_router is not None
        num_bytes = WIDENED_BYTES if x_TI.device.type == "cpu" else LAUNCHED_BYTES
        pieces = x_TI.split(max(1, num_bytes // (4 * x_TI.shape[1])))
        return torch.cat([self.goat_router.float() @ piece.float().T for piece in pieces], dim=1).T

    def _rank_gates(self, logits_TE: Tensor | None, dtype: torch.dtype) -> Tensor | float:
        """What multiplies the rank-R activations: ``s_e g_e``, repeated over the D rows of expert e ``[T, R]``."""
        if logits_TE is None:
            return self.scale if self.goat_s is None else self.goat_s.to(dtype).repeat_interleave(self.expert_rank)
        top_TK, index_TK = logits_TE.topk(self.top_k, dim=-1)
        # The kept probabilities, renormalised, are a softmax over the kept logits.
        gates_TE = torch.zeros_like(logits_TE).scatter(-1, index_TK, top_TK.T.softmax(dim=0).T)
        scaled_TE = gates_TE * (self.scale if self.goat_s is None else self.goat_s.to(logits_TE.dtype))
        return scaled_TE.to(dtype).repeat_interleave(self.expert_rank, dim=1)

    def _residual_gates(self, dtype: torch.dtype) -> Tensor | float:
        """What multiplies the start's activations: ``-s_e/E`` (Theorem 3.4), a number or ``[R]``."""
        if self.goat_s is None:
            return -self.scale / self.num_experts
        return -self.goat_s.to(dtype).repeat_interleave(self.expert_rank) / self.num_experts


class GoatForCausalLM(PreTrainedModel):
    """The way in: gives a model of the base architecture whose class also inherits from this one.

    ``goat_class`` makes that class, so generation, attention, caches and tied weights are the base's own.
    """

    _auto_class = "AutoModelForCausalLM"

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Load like any transformers model; the config says which architecture to build."""
        if cls is not GoatForCausalLM:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config or pretrained_model_name_or_path, trust_remote_code=False)
        model_class = goat_class(config.goat["architecture"])
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        if cls is not GoatForCausalLM:
            return super()._from_config(config, **kwargs)
        return goat_class(config.goat["architecture"])._from_config(config, **kwargs)

    def post_init(self) -> None:
        """Put the experts on their layers once the base is built, before weights are tied and loaded."""
        goat = self.config.goat
        for path, scale in goat["layers"].items():
            layer = GoatLayer(
                self.get_submodule(path),
                scale=scale,
                r=goat["r"],
                num_experts=goat["num_experts"],
                top_k=goat["top_k"],
                routed=goat["routed"],
                residual=goat["residual"],
                adaptive_scale=goat["adaptive_scale"],
            )
            self.set_submodule(path, layer)
        moved = {f"{path}.weight": f"{path}.base_layer.weight" for path in goat["layers"]}
        if self._tied_weights_keys:
            self._tied_weights_keys = {
                moved.get(target, target): moved.get(source, source)
                for target, source in self._tied_weights_keys.items()
            }
        super().post_init()


@cache
def goat_class(architecture: str) -> type[PreTrainedModel]:
    """Make the class of one base architecture with GOAT layers.

    It is called ``GoatForCausalLM`` too, because transformers writes the name of a model's class into its config, and
    that name is looked up in this file when the model is loaded again.

    Args:
        architecture: Name of a causal language model's class in transformers.
    """
    base: type[PreTrainedModel] = getattr(transformers, architecture)
    members = {
        "__module__": __name__,
        "__doc__": f"{architecture} with GOAT layers.",
        "config_class": base.config_class,
    }
    return type(GoatForCausalLM.__name__, (GoatForCausalLM, base), members)


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return out and in features."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]
