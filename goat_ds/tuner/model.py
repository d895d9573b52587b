"""GOAT on a whole model: which layers, their start, and the balance loss on its way to the routers."""

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm import tqdm
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.pytorch_utils import Conv1D

from goat_ds.errors import ConfigError, MergeError, raise_if_any
from goat_ds.method.routing import BalanceSignal, carry_balance, carry_balance_by_log_probs
from goat_ds.method.spectrum import segment_problem
from goat_ds.precision import dtype_name
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize, plain_path
from goat_ds.tuner.config import Residual
from goat_ds.tuner.fingerprint import BaseFingerprint, fingerprint, sample_layer
from goat_ds.tuner.layer import MERGE_REFUSAL, GoatExperts, GoatLayer, GoatLinear
from goat_ds.tuner.quantized import QuantizedLinear, is_4bit, is_8bit, keep_trainable, packing_of
from goat_ds.tuner.whole_experts import experts_of_kind

PREFIX = "goat_"


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded on a base that is quantised in another way than the one it was trained on."""


class NamedExperts(NamedTuple):
    """One adapted layer of one adapter, with its path in the model."""

    path: str
    layer: GoatLayer
    experts: GoatExperts


IGNORE = -100
"""The label of a position that no loss is taken at; PyTorch's and transformers' own ignore index."""
ADAPTER_NAME = "default"
"""PEFT's name for the first adapter of a model."""


class GoatModel(BaseTuner):
    """Puts GOAT experts on the layers a ``GoatConfig`` names.

    A loss that the model computes itself carries the balance loss; for a loss computed outside there is
    ``with_balance_loss``.
    """

    prefix = PREFIX
    tuner_layer_cls = GoatLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT declares it as an instance's)
    peft_config: dict[str, Any]
    # The balance signal belongs to the whole model, so layers alone (inject_adapter_in_model) would not train it.
    uses_shared_state = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On the base and not in this forward, which PEFT goes around where a config names no task.
        self._hooks = (
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base returns."""
        # PEFT before 0.21 calls the base's forward method, which goes around its hooks.
        return self.model(*args, **kwargs)

    @property
    def signal(self) -> BalanceSignal:
        """What passes between forward, loss and the routers' backward."""
        if "_signal" not in self.__dict__:
            self.__dict__["_signal"] = BalanceSignal()
        return self.__dict__["_signal"]

    def set_step(self, steps_done: int) -> None:
        """Set how far the residual of the active adapters has warmed up, before the step that comes next.

        A function of the step alone, so a run that goes on needs no more than that. Outside of training it has no
        effect.
        """
        wanted = {self.peft_config[name].rho_warmup_steps for name in self.active_adapters}
        if len(wanted) > 1:
            raise ConfigError(
                f"rho_warmup_steps ({', '.join(map(str, sorted(wanted)))}) must be the same for all active adapters; "
                "train them one after the other, or give them the same"
            )
        self.signal.mean_share = min(1.0, steps_done / num_steps) if (num_steps := max(wanted, default=0)) else 1.0

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make the layers of one adapter and start it, unless its config is deferred.

        Raises:
            ConfigError: a name matches no layer, or layers are too small for their experts: all of them, before any
                SVD.
        """
        self._misfits: list[str] = []
        config = self.peft_config[adapter_name]
        if not any(_is_linear(module) for module in model.modules()):
            raise ConfigError("target_modules: the model has no nn.Linear or Conv1D to adapt")
        try:
            with warnings.catch_warnings():
                # What PEFT warns of here is refused below.
                warnings.filterwarnings("ignore", message="You have passed exclude_modules")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            if "not found in the base model" not in str(error):
                # PEFT's own words, such as for targets that are all excluded.
                raise ConfigError(f"target_modules: {error}") from error
            targets = config.target_modules
            shown = targets if isinstance(targets, str) else ", ".join(sorted(targets))
            raise ConfigError(_matches_no_layer("target_modules", shown, model)) from None
        self._misfits.extend(_unmatched(config, model))
        try:
            # Before anything starts, and so that an adapter that cannot start is taken back.
            self._base_quantization()
        except ConfigError as error:
            self._misfits.extend(error.problems)
        if self._misfits:
            self._take_back(adapter_name)
        raise_if_any(self._misfits)
        keep_trainable(model)
        if not config.deferred:
            # Before the start, which may fold something into the weights.
            self.record_base(adapter_name, fingerprint=self._fingerprint(adapter_name))
            self.start(adapter_name)

    def _take_back(self, adapter_name: str) -> None:
        """Leave the base as it was before an adapter that does not fit."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT would copy a weight, and a head that is saved whole need not have one of its own.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def start(self, adapter_name: str) -> None:
        """Fill an adapter from base weights that are whole on this process, with a progress bar."""
        named = list(named_experts(self, adapter_name))
        for item in tqdm(named, desc="GOAT start", unit="layer", disable=len(named) < 16):
            item.layer.start(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        if peft_config.target_modules == "all-linear" and peft_config.layers_to_transform is not None:
            # PEFT looks at the blocks for short names only, and "all-linear" becomes whole paths.
            _maybe_include_all_linear_layers(peft_config, self.model)
            peft_config.target_modules = {path.rpartition(".")[2] for path in peft_config.target_modules}
        return peft_config

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(c.residual is Residual.FOLD for c in self.peft_config.values()):
            raise ConfigError(
                "residual (fold) changes the base weight, so such an adapter must be the only one on its base; "
                "use residual='lowrank' for several"
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, GoatLayer) else target
        if misfit := next(self._misfits_of(base, parent, current_key, peft_config), None):
            self._misfits.append(misfit)
            return
        if isinstance(target, GoatLayer):
            layer = target
        else:
            layer = GoatLinear(target)
            self._replace_module(parent, target_name, layer, target)
        out_features, in_features = linear_shape(base)
        experts = experts_of_kind(
            peft_config,
            name=current_key if adapter_name == ADAPTER_NAME else f"{current_key}.{adapter_name}",
            in_features=in_features,
            out_features=out_features,
            like=_like(base),
            signal=self.signal,
        )
        layer.goat_experts[adapter_name] = experts
        layer.set_adapter(self.active_adapters)
        if adapter_name not in self.active_adapters:
            experts.requires_grad_(False)

    def _misfits_of(self, base: nn.Module, parent: nn.Module, path: str, config: Any) -> Iterator[str]:
        """Yield why a layer cannot have experts. Only the first counts: a later check may rest on an earlier one."""
        if not _is_linear(base):
            yield f"target_modules: {path} is a {type(base).__name__}; only nn.Linear and Conv1D can be adapted"
        if is_8bit(base):
            yield (
                f"{path} is 8-bit (LLM.int8()), which experts cannot start from; load the base in 4 bits, or "
                "unquantised"
            )
        if is_4bit(base) and config.residual is Residual.FOLD:
            yield (
                f"{path} is 4-bit already, and residual (fold) cannot be subtracted from it; use residual='lowrank', "
                "or export an adapter that was trained so with launch/export.py --mode exact"
            )
        if isinstance(parent, nn.MultiheadAttention):
            yield (
                f"target_modules: {path} is read by nn.MultiheadAttention without being called, so experts on it would "
                "do nothing; put it in exclude_modules"
            )
        if not config.init.decomposes:
            return
        out_features, in_features = linear_shape(base)
        problem = segment_problem(
            out_features=out_features, in_features=in_features, num_experts=config.num_experts, r=config.r
        )
        if problem:
            yield f"{path}: {problem}; lower r, or put it in exclude_modules"
        if config.residual is Residual.FOLD and (shared := self._shares_weight(base)):
            yield (
                f"{path}: its weight is also that of {shared}, which residual (fold) would change; use "
                "residual='lowrank', or put it in exclude_modules"
            )

    def _shares_weight(self, layer: nn.Module) -> str | None:
        """Name another module that holds the same weight, such as an embedding tied to the head."""
        for name, module in self.model.named_modules():
            if module is not layer and module._parameters.get("weight") is layer.weight:
                return name
        return None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names: a batch cannot mix GOAT adapters; call the model once for each adapter, after "
                "model.set_adapter(name)"
            )
        yield

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # PEFT loads with strict=False, and half an adapter over another one is neither of them. An entry in the last
        # argument, the list of errors, fails the loading whatever its strictness.
        args[-1].extend(self._incomplete_adapters(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def record_base(self, adapter_name: str, *, fingerprint: BaseFingerprint | None) -> None:
        """Write into an adapter's config how its base is quantised, and its content.

        Args:
            adapter_name: Whose config.
            fingerprint: Of the unquantised base that its experts started on; None: unknown.

        Raises:
            ConfigError: some layers are packed in one way and some in another.
        """
        quantization = self._base_quantization()
        # A copy, because the config may be the user's own and serve another model too.
        config = copy.copy(self.peft_config[adapter_name])
        config.base_quantization = quantization and quantization.to_dict()
        config.base_fingerprint = fingerprint and fingerprint._asdict()
        self.peft_config[adapter_name] = config

    def _fingerprint(self, adapter_name: str) -> BaseFingerprint | None:
        """Return the content of the base by weights of this process; None where some are 4-bit already, or not here."""
        items = list(named_experts(self.model, adapter_name))
        if any(is_4bit(item.layer.get_base_layer()) or not item.layer.has_whole_weight for item in items):
            return None
        return fingerprint({item.path: sample_layer(item.layer.weight_OI()) for item in items})

    def _base_quantization(self) -> BaseQuantization | None:
        layers: list[tuple[str, Any]] = list(layers_to_quantize(self.model, kept=()))
        four_bit = [layer for _, layer in layers if is_4bit(layer)]
        packings = {packing_of(layer) for layer in four_bit}
        if not packings:
            return None
        if len(packings) > 1:
            raise ConfigError(f"the base's 4-bit layers are packed in different ways: {', '.join(map(str, packings))}")
        first = four_bit[0]
        is_ours = isinstance(first, QuantizedLinear)
        dtype = first.dtype if is_ours else getattr(self.model, "dtype", torch.get_default_dtype())
        weight_dtype = first.weight_dtype if is_ours else first.weight.quant_state.dtype
        return BaseQuantization(
            packing=packings.pop(),
            dtype=dtype_name(dtype),
            weight_dtype=dtype_name(weight_dtype),
            compute_dtype=dtype_name(first.compute_dtype or dtype),
            kept=tuple(path for path, layer in layers if not is_4bit(layer)),
        )

    def _warn_of_other_base(self, adapter_name: str) -> None:
        values = self.peft_config[adapter_name].base_quantization
        trained, found = values and BaseQuantization.from_dict(values), self._base_quantization()
        if _what_counts(trained) != _what_counts(found):
            warnings.warn(
                f"the GOAT adapter {adapter_name} was trained on a base that is {_shown(trained)}, and this base is "
                f"{_shown(found)}: it will answer a little differently than in training",
                BaseMismatchWarning,
                stacklevel=2,
            )

    def _incomplete_adapters(self, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
        for adapter_name in self.peft_config:
            expected = {
                f"{prefix}{item.path}.goat_experts.{adapter_name}.{tensor}"
                for item in named_experts(self, adapter_name)
                for tensor, _ in item.experts.named_parameters()
            }
            absent = expected - state_dict.keys()
            if expected and not absent:
                self._warn_of_other_base(adapter_name)
            if absent and absent != expected:
                keys = [self._remove_adapter_name_from_key(key, adapter_name) for key in absent]
                yield f"the file of GOAT adapter {adapter_name} lacks {_some_of(keys)}"
        # PEFT leaves a key of the file as it is where the model has no tensor for it.
        if surplus := [key for key in state_dict if key.rpartition(".")[2].startswith(PREFIX)]:
            yield f"the file of a GOAT adapter holds tensors that the model has no place for: {_some_of(surplus)}"

    def _before_forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A reference model's forward between this micro-batch's and its backward must not make it forgotten.
        if torch.is_grad_enabled() or not base.training:
            mask = self._arguments(args, kwargs).get("attention_mask")
            self.signal.begin_forward(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)

    def _after_forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Let the loss in the output carry the balance loss."""
        if not (base.training and torch.is_grad_enabled()):
            return output
        loss, log_probs = getattr(output, "loss", None), getattr(output, "log_probs", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            output.loss = self.with_balance_loss(loss, weight=self._share_of_batch(self._arguments(args, kwargs)))
        if isinstance(log_probs, Tensor) and log_probs.requires_grad:
            label_mask = getattr(output, "label_mask", None)
            output.log_probs = carry_balance_by_log_probs(log_probs, self.signal, label_mask=label_mask)
        return output

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the base's arguments, some of which may have come by position."""
        return (
            dict(zip(inspect.signature(self.model.forward).parameters, args, strict=False)) | kwargs if args else kwargs
        )

    def _share_of_batch(self, arguments: dict[str, Any]) -> Tensor | float:
        """Return the share of this micro-batch in a loss that is normalised over several of them."""
        num_items = arguments.get("num_items_in_batch")
        targets = arguments.get("shift_labels")
        if targets is None:
            targets = arguments.get("labels")
            if targets is not None and targets.dim() > 1 and self._shifts_labels():
                targets = targets[..., 1:]
        if targets is None or num_items is None:
            return 1.0
        return (targets != IGNORE).sum() / num_items

    def _shifts_labels(self) -> bool:
        """Return whether the base's loss leaves out the first token of a sequence, which is nobody's target."""
        is_encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return not is_encoder_decoder and getattr(self.model, "loss_function", None) in (None, ForCausalLMLoss)

    def balance_loss(self) -> Tensor | None:
        """Return ``balance_coef * Σ_layers L_b`` of the last forward, detached; None where nothing was routed."""
        return self.signal.balance_loss()

    def with_balance_loss(self, loss: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
        """Return ``loss + weight * balance_loss()``, whose backward also trains the routers.

        Args:
            loss: Scalar computed from the outputs of the last forward.
            weight: Share of this micro-batch in the balance loss of the whole batch.
        """
        balance = self.balance_loss()
        return loss if balance is None else carry_balance(loss, balance.to(loss.device), self.signal, weight=weight)

    def _check_merge_allowed(self) -> None:
        raise MergeError(MERGE_REFUSAL)

    def unload(self) -> nn.Module:
        """Return the base model without adapters and with nothing folded into it."""
        items = [(name, item) for name in self.peft_config for item in named_experts(self, name)]
        if any(item.experts.folded and is_4bit(item.layer.get_base_layer()) for _, item in items):
            # Before any layer is changed.
            raise ConfigError("residual (fold) cannot be taken out of 4-bit weights; load the base again")
        for adapter_name, item in items:
            item.layer.unfold(adapter_name)
        for hook in self._hooks:
            hook.remove()
        return super().unload()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse, with the way out.

        Raises:
            MergeError: always.
        """
        raise MergeError(MERGE_REFUSAL)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".goat_experts.{adapter_name}.", f".{PREFIX}")


def with_balance_loss(model: PeftModel, loss: Tensor) -> Tensor:
    """Return ``loss`` plus the model's balance loss; its backward trains the routers.

    For a loss computed outside of the model, from the outputs of its last forward. A loss that the model returned
    carries the balance loss already.
    """
    tuner: Any = model.base_model
    return tuner.with_balance_loss(loss)


def named_experts(model: nn.Module, adapter_name: str) -> Iterator[NamedExperts]:
    """Yield the layers of one adapter, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, GoatLayer) and adapter_name in module.goat_experts:
            yield NamedExperts(path, module, module.goat_experts[adapter_name])  # type: ignore[arg-type]


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return out and in features of an ``nn.Linear`` or ``Conv1D``, also where its weight is sharded."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def _unmatched(config: Any, model: nn.Module) -> Iterator[str]:
    """Yield which names of target and exclude lists match no layer, by PEFT's rule: the whole path or its end."""
    paths = set(_linear_paths(model))
    # A target that is there and is not linear is a misfit with words of its own.
    modules = paths | {path for path, _ in model.named_modules()}
    targets, excluded = config.target_modules, config.exclude_modules or ()
    if not isinstance(targets, str) and (absent := [name for name in targets if not _ends_any(modules, name)]):
        yield _matches_no_layer("target_modules", _some_of(absent), model)
    if isinstance(excluded, str):
        absent = [] if any(re.fullmatch(excluded, path) for path in paths) else [excluded]
    else:
        absent = [name for name in excluded if not _ends_any(paths, name)]
    if absent:
        yield _matches_no_layer("exclude_modules", _some_of(absent), model)


def _ends_any(paths: set[str], name: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _matches_no_layer(setting: str, value: str, model: nn.Module) -> str:
    names = sorted({path.rpartition(".")[2] for path in _linear_paths(model)})
    return f"{setting} ({value}) matches no layer; linear layers are: {', '.join(names)}"


def _linear_paths(model: nn.Module) -> Iterator[str]:
    """Yield the paths of linear layers, as they were before PEFT wrapped any."""
    for path, module in model.named_modules():
        if _is_linear(module):
            yield plain_path(path)


def _like(base: Any) -> Tensor:
    """Return an empty tensor of the device and dtype that experts on a layer have."""
    if not is_4bit(base):
        return torch.empty(0, dtype=base.weight.dtype, device=base.weight.device)
    # bitsandbytes' storage says nothing of what the model computes in, not even where it is a floating-point dtype.
    dtype = base.dtype if isinstance(base, QuantizedLinear) else torch.get_default_dtype()
    return torch.empty(0, dtype=dtype, device=base.weight.device)


def _what_counts(quantization: BaseQuantization | None) -> Any:
    return quantization and (quantization.packing, set(quantization.kept))


def _shown(quantization: BaseQuantization | None) -> str:
    if quantization is None:
        return "not quantised"
    kept = f", {len(quantization.kept)} layers kept" if quantization.kept else ""
    return f"4-bit ({quantization.packing}{kept})"


def _some_of(keys: list[str]) -> str:
    shown = sorted(keys)[:8]
    return ", ".join(shown) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)
