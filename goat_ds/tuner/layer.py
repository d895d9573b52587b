"""A linear layer with GOAT experts beside it, as PEFT's layers are: one frozen base, any number of adapters.

Shape letters: T tokens, I in features, O out features, E experts, R total rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goat_ds.errors import ConfigError, MergeError
from goat_ds.method.dense_fit import gated_factors
from goat_ds.method.input_gradient import SummedGradient, sum_gradients
from goat_ds.method.mixture import MixtureFactors, MixtureOutput, MixtureSettings, mixture
from goat_ds.method.router import RouterSettings
from goat_ds.method.routing import BalanceSignal
from goat_ds.method.scaling import adaptive_scales, expert_scale, residual_scale
from goat_ds.method.spectrum import (
    Directions,
    Factors,
    Init,
    add_residual_,
    chosen_indices,
    decompose,
    factors_from,
    leading_of_qr,
    zero_init,
)
from goat_ds.tuner.config import GoatConfig, Residual
from goat_ds.tuner.quantized import QuantizedLinear, is_4bit, weight_of_4bit

FROZEN = ("A0", "B0", "s")
ROUTER = ("router", "threshold", "threshold_bias")
"""Parameters that a dense layer has no more."""
PRODUCTS = (nn.Linear, Conv1D, QuantizedLinear)
"""Layers, themselves and not what derives from them, that are one product: no backward needs their output."""
MERGE_REFUSAL = (
    "a GOAT adapter is never merged in place: what routed experts add depends on the token; write a checkpoint "
    "instead: python launch/export.py --mode exact, or --mode dense for the nearest dense weights and what they cost"
)


class GoatExperts(nn.Module):
    """The experts of one adapter on one layer, their router, and their frozen initial factors.

    ZeRO-3 gathers the parameters of the module whose forward runs, so this module owns the parameters that its forward
    uses. They have no values until ``start`` or an adapter file fills them.
    """

    def __init__(
        self, config: GoatConfig, *, name: str, in_features: int, out_features: int, like: Tensor, signal: BalanceSignal
    ) -> None:
        super().__init__()
        self.config, self.name, self.signal = config, name, signal
        self.in_features, self.out_features = in_features, out_features
        self.ready = False
        self.folded = False
        self._add_experts({"device": like.device, "dtype": like.dtype})

    def _add_experts(self, place: dict[str, Any]) -> None:
        config, r = self.config, self.config.r
        in_features, out_features = self.in_features, self.out_features
        self.A = nn.Parameter(torch.empty(config.num_rows_A, in_features, **place))
        self.B = nn.Parameter(torch.empty(out_features, r, **place))
        has_initial = config.init.decomposes
        self.A0 = _frozen(torch.empty(r, in_features, **place)) if has_initial else None
        self.B0 = _frozen(torch.empty(out_features, r, **place)) if has_initial else None
        self._add_router(place)
        self.s = _frozen(torch.empty(config.num_experts, **place)) if config.adaptive_scale else None

    def _add_router(self, place: dict[str, Any]) -> None:
        config, in_features = self.config, self.in_features
        has_router = config.num_experts > 1 and config.routed
        self.router = nn.Parameter(torch.empty(config.num_choices, in_features, **place)) if has_router else None
        has_threshold = config.has_threshold
        self.threshold = nn.Parameter(torch.empty(1, in_features, **place)) if has_threshold else None
        self.threshold_bias = nn.Parameter(torch.empty(1, **place)) if has_threshold else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def scale(self) -> float:
        """``s`` of this layer; GOAT-s keeps one per expert in the parameter ``s``."""
        return expert_scale(
            self.config.scaling,
            in_features=self.in_features,
            expert_rank=self.config.expert_rank,
            eta=self.config.eta,
            lora_alpha=self.config.lora_alpha,
        )

    def indices(self) -> Tensor:
        """List the directions of the spectrum each expert starts from ``[E, D]``."""
        return chosen_indices(
            self.config.init,
            num_directions=min(self.in_features, self.out_features),
            num_experts=self.config.num_experts,
            r=self.config.r,
        )

    def directions_in(self, weight_OI: Tensor) -> Directions:
        """Decompose the base weight where the experts start; by QR for ``init="olora"``.

        Raises:
            ConfigError: the weight holds values that are no numbers.
        """
        if not weight_OI.isfinite().all():
            raise ConfigError(f"the weight of {self.name} holds values that are not finite; load a base that is whole")
        if self.config.init is Init.OLORA:
            return leading_of_qr(weight_OI, self.config.r)
        return decompose(weight_OI, self.indices())

    @torch.no_grad()
    def start(self, directions: Directions | None) -> None:
        """Fill every parameter with its value at the start.

        Args:
            directions: Of the base weight at ``indices()``; None for ``init="zero"``.
        """
        if directions is None:
            factors = zero_init(
                out_features=self.out_features,
                in_features=self.in_features,
                r=self.config.r,
                num_rows=self.config.num_rows_A,
                dtype=self.A.dtype,
                device=self.A.device,
            )
        elif self.config.init is Init.OLORA:
            factors = Factors(directions.v_RI, directions.u_OR)
        else:
            factors = factors_from(directions, scale_R=self._scale_per_direction(directions), rho=self.config.rho)
        self.A.copy_(factors.a_RI)
        self.B.copy_(factors.b_OR)
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(self.A)
            self.B0.copy_(self.B)
        self._start_router()
        self.ready = True

    def _start_router(self) -> None:
        if self.router is not None:
            nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        if self.threshold is not None and self.threshold_bias is not None:
            # As nn.Linear starts, which it is in AdaMoLE's code.
            nn.init.kaiming_uniform_(self.threshold, a=math.sqrt(5))
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.threshold_bias, -bound, bound)

    def _scale_per_direction(self, directions: Directions) -> Tensor | float:
        if self.s is None:
            return self.scale
        singular_values_ED = directions.s_R.unflatten(0, (self.config.num_experts, -1))
        self.s.copy_(adaptive_scales(self.scale, singular_values_ED))
        # The stored scale is the one that counts from here on, whatever it was rounded to.
        return self.s.to(directions.s_R).repeat_interleave(self.config.expert_rank)

    @property
    def folds(self) -> bool:
        """Whether the residual is subtracted from the base weight, and not computed beside it."""
        return self.config.residual is Residual.FOLD and self.A0 is not None

    def become_dense(self, config: GoatConfig) -> None:
        """Remove the router. The caller then fills ``A``, and ``A0`` where the residual is gated, with dense forms.

        Args:
            config: The ``tuner.fit_sums.dense_goat_config`` of the adapter's own, the same object for all its layers.
        """
        for name in ROUTER:
            setattr(self, name, None)
        self.config = config

    def add_residual_(self, weight_OI: Tensor, *, times: int) -> None:
        """Add ``times`` the residual ``W_res = Σ_e s_e c_e B0_e A0_e`` to a weight in place."""
        assert self.A0 is not None and self.B0 is not None
        add_residual_(
            weight_OI,
            Factors(self.A0, self.B0),
            scale=self.scale,
            scale_E=self.s,
            num_experts=self.config.num_experts,
            shared_experts=self.config.shared_experts,
            times=times,
        )

    def forward(
        self,
        x: Tensor,
        base: Tensor,
        *,
        is_active: bool = True,
        into_base: bool = False,
        summed: SummedGradient | None = None,
    ) -> Tensor:
        """Return the base's output plus that of this adapter, ``[..., O]``.

        An adapter that is not active adds back the residual that it subtracted from the base weight, and nothing else.

        Args:
            x: The layer's input, detached where ``summed`` is given.
            base: What the base layer, and adapters before this one, made of it.
            is_active: Whether this adapter counts.
            into_base: Whether the result may take the place of ``base`` in memory.
            summed: What takes this adapter's part of the gradient of ``x``, if not autograd.
        """
        if not is_active:
            return base + self._residual_of(x) if self.folded else base
        if not self.ready:
            raise ConfigError(
                f"the GOAT adapter of {self.name} is empty: its config is deferred, and neither an adapter file nor "
                "shared decomposition has filled it; use a GoatConfig with deferred=False to start from the weights"
            )
        # Under autocast the base has chosen the dtype to compute in; the router's product must stay in fp32.
        x = x.to(base.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            output = self._mixed(x, base, into_base=into_base, summed=summed)
        if output.load is not None:
            self.signal.record(self.name, output.load, coef=self._balance_coef())
        return output.y

    def _mixed(self, x: Tensor, base: Tensor, **how: Any) -> MixtureOutput:
        return mixture(
            x,
            base,
            self.factors(),
            self.settings(),
            signal=self.signal,
            dropout_seed=self._seed(self.config.dropout),
            router_seed=self._router_seed(),
            **how,
        )

    def _residual_of(self, x: Tensor) -> Tensor:
        """Return ``W_res x``."""
        assert self.A0 is not None and self.B0 is not None
        scale_R: Tensor | float = self.scale
        if self.s is not None:
            scale_R = self.s.to(x.dtype).repeat_interleave(self.config.expert_rank)
        config = self.config
        counts_R = residual_scale(
            scale_R,
            r=config.r,
            num_experts=config.num_experts,
            shared_experts=config.shared_experts,
            dtype=x.dtype,
            device=x.device,
        )
        h = nn.functional.linear(x, self.A0.to(x.dtype)) * counts_R
        return nn.functional.linear(h, self.B0.to(h.dtype))

    def factors(self) -> MixtureFactors:
        """Return the tensors that the mixture computes with; under ZeRO-3 they are whole inside of forward only."""
        residual = self.config.residual is not Residual.FOLD
        return MixtureFactors(
            a_RI=self.A,
            b_OR=self.B,
            a0_RI=self.A0 if residual else None,
            b0_OR=self.B0 if residual else None,
            router_EI=self.router,
            scale_E=self.s,
            threshold_1I=self.threshold,
            threshold_bias_1=self.threshold_bias,
        )

    def gated_factors(self) -> Factors:
        """Return what gates stand between: what a dense fit is made for, without scales."""
        start = None
        if self.config.takes_gates:
            assert self.A0 is not None and self.B0 is not None
            start = Factors(self.A0, self.B0)
        return gated_factors(Factors(self.A, self.B), start, num_experts=self.config.num_experts)

    def settings(self) -> MixtureSettings:
        """Return the numbers that the mixture computes with."""
        return MixtureSettings(
            **vars(self.router_settings()),
            scale=self.scale,
            dropout=self.config.dropout,
            mean_share=self._mean_share(),
        )

    def router_settings(self) -> RouterSettings:
        """Return the numbers that the router computes with."""
        config = self.config
        return RouterSettings(
            num_experts=config.num_experts,
            top_k=config.top_k,
            balance_coef=self._balance_coef() if self.training else 0.0,
            routing=config.routing,
            top_p=config.top_p,
            max_threshold=config.max_threshold or 1 / config.num_choices,
            shared_experts=config.shared_experts,
            temperature=config.temperature,
            router_noise=config.router_noise if self.training else 0.0,
            expert_dropout=config.expert_dropout if self.training else 0.0,
        )

    def _mean_share(self) -> float:
        if self.config.residual is Residual.GATED:
            return 0.0
        warms_up = self.training and self.config.rho_warmup_steps
        return self.signal.mean_share if warms_up else 1.0

    def _balance_coef(self) -> float:
        # A frozen router has no balance to train, and its loss would train the layers before it.
        is_frozen = self.training and self.router is not None and not self.router.requires_grad
        return 0.0 if is_frozen else self.config.balance_coef

    def _router_seed(self) -> int | None:
        is_routed = self.router is not None
        return self._seed(self.config.router_noise or self.config.expert_dropout) if is_routed else None

    def _seed(self, chance: float) -> int | None:
        """Return the seed of something that happens by chance in training; None: it does not happen."""
        # Drawn on the host, where both kinds of checkpointing restore the generator before they run a layer again.
        return int(torch.randint(2**62, (), device="cpu")) if self.training and chance else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if all(prefix + name in state_dict for name, _ in self.named_parameters(recurse=False)):
            self.ready = True


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class GoatLayer(nn.Module, BaseTunerLayer):
    """A frozen ``nn.Linear`` or ``Conv1D`` and the GOAT adapters on it.

    The outputs of all active adapters are added, each with its own router.
    """

    adapter_layer_names = ("goat_experts",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.goat_experts = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.register_load_state_dict_post_hook(_fold_what_was_loaded)

    def _experts(self) -> dict[str, GoatExperts]:
        return dict(self.goat_experts.items())  # type: ignore[arg-type]

    @property
    def transposed(self) -> bool:
        """Whether the base stores its weight as ``[I, O]``."""
        return isinstance(self.get_base_layer(), Conv1D)

    @torch.no_grad()
    def start(self, adapter_name: str) -> None:
        """Fill an adapter from the base weight of this process.

        Raises:
            ConfigError: the weight is not here: partitioned, or on the meta device.
        """
        experts = self._experts()[adapter_name]
        directions = experts.directions_in(self.weight_OI()) if experts.config.init.decomposes else None
        experts.start(directions)
        self.fold(adapter_name)

    @property
    def has_whole_weight(self) -> bool:
        """Whether the base weight is on this process: neither partitioned nor on the meta device."""
        base: Any = self.get_base_layer()
        weight = base.weight
        is_matrix = weight.dim() == 2 and weight.dtype.is_floating_point
        return not weight.is_meta and weight.numel() > 0 and (is_matrix or is_4bit(base))

    def weight_OI(self) -> Tensor:
        """Return the whole base weight ``[O, I]``; what a 4-bit weight stands for, in fp32.

        Raises:
            ConfigError: the weight is not here: partitioned, or on the meta device.
        """
        base: Any = self.get_base_layer()
        weight = base.weight
        if not self.has_whole_weight:
            raise ConfigError(
                f"the weight under a GOAT adapter is not whole on this process (shape {tuple(weight.shape)}, "
                f"{weight.dtype}, {weight.device}); train sharded models with launch/train.py, which shares out the "
                "decomposition"
            )
        if is_4bit(base):
            return weight_of_4bit(base)
        return weight.T if self.transposed else weight

    def _writable_weight_OI(self) -> Tensor:
        if is_4bit(self.get_base_layer()):
            raise ConfigError(
                "residual (fold) cannot be added to or taken from a weight that is 4-bit already; load the base again, "
                "or use residual='lowrank'"
            )
        return self.weight_OI()

    @torch.no_grad()
    def fold(self, adapter_name: str) -> None:
        """Subtract the residual from the base weight, once, if the config says ``residual="fold"``."""
        experts = self._experts()[adapter_name]
        if experts.folds and not experts.folded:
            experts.add_residual_(self._writable_weight_OI(), times=-1)
            experts.folded = True

    @torch.no_grad()
    def unfold(self, adapter_name: str) -> None:
        """Add back what ``fold`` subtracted; the base is what it was up to one rounding to its dtype."""
        experts = self._experts()[adapter_name]
        if experts.folded:
            experts.add_residual_(self._writable_weight_OI(), times=1)
            experts.folded = False

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, and from the base what it had folded into it."""
        if adapter_name in self.goat_experts:
            self.unfold(adapter_name)
        super().delete_adapter(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus that of every active adapter."""
        active = [] if self.disable_adapters else self.active_adapters
        used = [
            (experts, name in active) for name, experts in self._experts().items() if name in active or experts.folded
        ]
        is_plain = self._is_plain
        is_shared = is_plain and not self._is_watched_backward and any(is_active for _, is_active in used)
        is_shared = is_shared and x.requires_grad and torch.is_grad_enabled()
        x_of_base, summed = sum_gradients(x) if is_shared else (x, None)
        result: Tensor = self.base_layer(x_of_base, *args, **kwargs)
        if not result.requires_grad:
            summed = None
        # Under ZeRO-3 DeepSpeed hooks every layer, and the sum is written beside the base's output.
        into_base = is_plain and not self._is_watched
        for experts, is_active in used:
            # Under ZeRO-3 DeepSpeed's function on every input would be given zeros where the gradient goes elsewhere.
            x_seen = x.detach() if is_active and summed is not None else x
            # A hook on the experts is given the base's output as well.
            is_unseen = into_base and not experts._forward_hooks
            result = experts(x_seen, result, is_active=is_active, into_base=is_unseen, summed=summed)
            into_base = False
        return result

    @property
    def _is_plain(self) -> bool:
        """Whether the base writes its output, and its gradient of ``x``, into memory that only this layer uses."""
        return type(self.base_layer) in PRODUCTS and "forward" not in vars(self.base_layer)

    @property
    def _is_watched(self) -> bool:
        """Whether a forward hook reads the base's output."""
        return bool(self.base_layer._forward_hooks or nn.modules.module._global_forward_hooks)

    @property
    def _is_watched_backward(self) -> bool:
        """Whether a backward hook reads the base's gradients."""
        hooks = (self.base_layer._backward_hooks, nn.modules.module._global_backward_hooks)
        return any(map(bool, hooks))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, with the way out.

        Raises:
            MergeError: always.
        """
        raise MergeError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refuse: nothing was merged.

        Raises:
            MergeError: always.
        """
        raise MergeError(MERGE_REFUSAL)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Runs before the experts' own loading, while the start that was folded is still known.
        for name, experts in self._experts().items():
            if f"{prefix}goat_experts.{name}.A0" not in state_dict:
                continue
            if f"{prefix}base_layer.weight" in state_dict:
                # The state of a whole model holds the base as it was: folded already.
                experts.folded = experts.config.residual is Residual.FOLD
            else:
                self.unfold(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT switches everything of an active adapter to trainable, and calls this afterwards.
        for experts in self._experts().values():
            for name in FROZEN:
                parameter = getattr(experts, name)
                if parameter is not None:
                    parameter.requires_grad_(False)


class GoatLinear(GoatLayer):
    """The module that takes the place of a linear layer in the model.

    PEFT counts an adapted layer among those of ``target_modules="all-linear"`` by ``Linear`` in the name of its class;
    a second adapter on the same base would match nothing otherwise.
    """


def _fold_what_was_loaded(layer: GoatLayer, _: Any) -> None:
    for name, experts in layer._experts().items():
        if experts.ready:
            layer.fold(name)
