"""A causal language model with GOAT experts beside its linear layers, for use with transformers alone.

GOAT routes every token through a mixture of low-rank experts (arXiv 2502.16894), so no dense weight equals it. This
file travels with the weights: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` builds the
architecture that ``config.goat["architecture"]`` names and puts experts on the layers that ``config.goat["layers"]``
lists with their scales. It imports torch and transformers, nothing else.

Shape letters: T tokens, I in features, O out features, E experts, N those that a router chooses among (not the shared
ones), C the columns of its product: N, and one more for a threshold, R total rank, D = R / E, G gated ranks: R, or 2 R
where the residual takes the gates too.
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
    """A linear layer plus its experts: ``W0 x + b + Σ_e s_e g_e(x) B_e A_e x - Σ_e s_e c_e B0_e A0_e x``.

    The experts are stacked: expert ``e`` owns rows ``e D … (e+1) D - 1`` of ``A``, unless all share an ``A`` of D rows,
    and those columns of ``B``. Every expert is computed for every token and the unselected ones are multiplied by zero.
    ``c_e`` is the mean gate, 1/N and 1 for a shared expert, or the token's own ``g_e`` where the residual takes the
    gates; then differences stand on both sides, ``g ∘ (B (A - A0) + (B - B0) A0) x``. Without a router, ``g_e`` is 1.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        scale: float,
        r: int,
        num_experts: int,
        routing: str,
        top_k: int,
        top_p: float,
        max_threshold: float,
        temperature: float,
        shared_experts: int,
        shared_A: bool,
        routed: bool,
        residual: bool,
        takes_gates: bool,
        adaptive_scale: bool,
    ) -> None:
        super().__init__()
        out_features, in_features = _linear_shape(base_layer)
        self.scale, self.num_experts, self.expert_rank = scale, num_experts, r // num_experts
        self.routing, self.top_k, self.top_p, self.max_threshold = routing, top_k, top_p, max_threshold
        self.temperature, self.shared_experts, self.takes_gates = temperature, shared_experts, takes_gates
        num_choices = num_experts - shared_experts
        # The base stays a module of its own, under PEFT's name for it, so that a quantizer finds a plain nn.Linear.
        self.base_layer = base_layer
        self.goat_A = nn.Parameter(torch.zeros(self.expert_rank if shared_A else r, in_features))
        self.goat_B = nn.Parameter(torch.zeros(out_features, r))
        self.goat_A0 = nn.Parameter(torch.zeros(r, in_features)) if residual else None
        self.goat_B0 = nn.Parameter(torch.zeros(out_features, r)) if residual else None
        self.goat_router = nn.Parameter(torch.zeros(num_choices, in_features)) if routed else None
        has_threshold = routed and routing == "threshold"
        self.goat_threshold = nn.Parameter(torch.zeros(1, in_features)) if has_threshold else None
        self.goat_threshold_bias = nn.Parameter(torch.zeros(1)) if has_threshold else None
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
        dtype, r = x_TI.dtype, self.goat_B.shape[1]
        u_TG, u0_TR, logits_TC = self._activations(x_TI)
        if u_TG.shape[1] < r:
            u_TG = u_TG.repeat(1, self.num_experts)
        h_TS = u_TG * self._rank_gates(logits_TC, dtype)
        if u0_TR is not None:
            h_TS = torch.cat([h_TS, u0_TR * self._residual_gates(dtype)], dim=1)
        b_OS = self.goat_B.to(dtype)
        if self.goat_B0 is not None:
            second_OR = self.goat_B - self.goat_B0 if self.takes_gates else self.goat_B0
            b_OS = torch.cat([b_OS, second_OR.to(dtype)], dim=1)
        return torch.addmm(base_TO, h_TS, b_OS.T)

    def _activations(self, x_TI: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what gates multiply, what they do not, and the router's logits.

        All by one product where one can give the logits in fp32.
        """
        dtype = x_TI.dtype
        router_CI: Tensor | None = self.goat_router
        a_GI: Tensor = self.goat_A
        a0_RI: Tensor | None = self.goat_A0
        if router_CI is not None and self.goat_threshold is not None:
            router_CI = torch.cat([router_CI, self.goat_threshold])
        if a0_RI is not None and self.takes_gates:
            a_GI, a0_RI = torch.cat([a_GI - a0_RI, a0_RI]), None
        is_half = dtype != torch.promote_types(dtype, torch.float32)
        is_apart = router_CI is not None and is_half and not (x_TI.is_cuda and router_CI.dtype == dtype)
        weights = (a_GI, a0_RI, None if is_apart else router_CI)
        there = [weight.to(dtype) for weight in weights if weight is not None]
        stacked_IG = torch.cat(there).T
        if is_half and router_CI is not None and not is_apart:
            product_TG = torch.mm(x_TI, stacked_IG, out_dtype=torch.float32)
        else:
            product_TG = x_TI @ stacked_IG
        parts = iter(product_TG.split([len(weight) for weight in there], dim=1))
        u_TG, u0_TR, logits_TC = (None if weight is None else next(parts) for weight in weights)
        assert u_TG is not None
        if is_apart and router_CI is not None:
            logits_TC = self._widened_logits(x_TI, router_CI)
        return u_TG.to(dtype), None if u0_TR is None else u0_TR.to(dtype), logits_TC

    def _widened_logits(self, x_TI: Tensor, router_CI: Tensor) -> Tensor:
        # Logits in bf16 would tie or swap experts whose logits differ by less than 1/256 of their size.
        num_bytes = WIDENED_BYTES if x_TI.device.type == "cpu" else LAUNCHED_BYTES
        pieces = x_TI.split(max(1, num_bytes // (4 * x_TI.shape[1])))
        return torch.cat([router_CI.float() @ piece.float().T for piece in pieces], dim=1).T

    def _rank_gates(self, logits_TC: Tensor | None, dtype: torch.dtype) -> Tensor | float:
        """What multiplies the gated activations: ``s_e g_e``, repeated over the D ranks of expert e ``[T, G]``."""
        num_parts = 2 if self.takes_gates else 1
        if logits_TC is None:
            if self.goat_s is None:
                return self.scale
            return self.goat_s.to(dtype).repeat_interleave(self.expert_rank).repeat(num_parts)
        gates_TN = self._gates(logits_TC)
        gates_TE = torch.cat([gates_TN.new_ones(len(gates_TN), self.shared_experts), gates_TN], dim=1)
        scaled_TE = gates_TE * (self.scale if self.goat_s is None else self.goat_s.to(logits_TC.dtype))
        return scaled_TE.to(dtype).repeat_interleave(self.expert_rank, dim=1).repeat(1, num_parts)

    def _gates(self, logits_TC: Tensor) -> Tensor:
        """Return the gates of the experts that the router chooses among ``[T, N]``."""
        logits_TN = logits_TC[:, : self.num_experts - self.shared_experts]
        if self.temperature != 1:
            logits_TN = logits_TN / self.temperature
        if self.routing == "threshold":
            assert self.goat_threshold_bias is not None
            threshold_T1 = self.max_threshold * (logits_TC[:, -1:] + self.goat_threshold_bias).sigmoid()
            over_TN = (_softmax(logits_TN) - threshold_T1).clamp_min(0)
            total_T1 = over_TN.sum(dim=-1, keepdim=True)
            return over_TN / torch.where(total_T1 == 0, torch.ones_like(total_T1), total_T1)
        if self.routing == "top_p":
            falling_TN, index_TN = _softmax(logits_TN).sort(dim=-1, descending=True, stable=True)
            needed_TN = (falling_TN.cumsum(dim=-1) - falling_TN < self.top_p) & (falling_TN > 0)
            kept_TN = torch.zeros_like(needed_TN).scatter(-1, index_TN, needed_TN)
            return _softmax(logits_TN.masked_fill(~kept_TN, -torch.inf))
        if self.top_k == logits_TN.shape[1]:
            return _softmax(logits_TN)
        top_TK, index_TK = logits_TN.topk(self.top_k, dim=-1)
        # The kept probabilities, renormalised, are a softmax over the kept logits.
        return torch.zeros_like(logits_TN).scatter(-1, index_TK, _softmax(top_TK))

    def _residual_gates(self, dtype: torch.dtype) -> Tensor | float:
        """What multiplies the start's activations: ``-s_e c_e`` (Theorem 3.4), a number or ``[R]``."""
        scale: Tensor | float = -self.scale
        if self.goat_s is not None:
            scale = -self.goat_s.to(dtype).repeat_interleave(self.expert_rank)
        if not self.shared_experts:
            return scale / self.num_experts
        divisor_R = torch.full_like(self.goat_B[0], self.num_experts - self.shared_experts, dtype=dtype)
        divisor_R[: self.shared_experts * self.expert_rank] = 1
        return scale / divisor_R


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
                **{name: value for name, value in goat.items() if name not in ("architecture", "merge_base", "layers")},
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


def _softmax(logits_TN: Tensor) -> Tensor:
    # With tokens next to each other in memory, as in training.
    return torch.softmax(logits_TN.T, dim=0).T


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return out and in features."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]
