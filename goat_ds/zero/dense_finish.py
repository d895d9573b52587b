"""Make routed experts dense in the middle of a run, and train on.

Tokens of the latest batches give every layer its least-squares dense form (``method.dense_fit``): ``A'`` takes the
place of ``A``, the router leaves, and what is left is a plain low-rank adapter. The optimizer goes on where it was:

    routed   h = g(x) ∘ A x     gradient of A  = Σ_t g δ xᵀ     E[g] = 1/E
    dense    h = A' x           gradient of A' = Σ_t δ xᵀ       A' ≈ E[g] ∘ A

So the gradient of ``A'`` is E times that of ``A``. Left so, it would dominate the norm that is clipped, and ``B`` would
all but stop; and the moments of ``A`` would be far too small for it. It is therefore divided by E, as if ``E A'`` were
trained: then the norm is what it was, the moments of ``A`` are those of ``A'``, and ``B`` goes on as it was. The rate
goes on by its schedule: a lower one for ``A'``, down to the 1/E that its size would suggest, ends worse. With shared
experts it is every expert's own mean gate: 1 for those, and 1/N for the N others.

A residual that takes the token's gates leaves with them: ``A0'`` takes the place of ``A0``, fitted in the same way.

Shape letters: T tokens, I in features, O out features, E experts, N those that a router chooses among, R total rank.
"""

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from torch import Tensor

from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, TrainingError
from goat_ds.method.dense_fit import TOKENS_PER_FEATURE, FitSums, fit_dense, gated_factors, is_finite, parted_forms
from goat_ds.method.scaling import residual_scale
from goat_ds.method.spectrum import Factors
from goat_ds.tuner.fit_sums import add_up_on, by_input, dense_goat_config, fit_sums_in_passes
from goat_ds.tuner.layer import GoatExperts
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.adapters import Rates
from goat_ds.zero.optimizer_state import TensorState, read_state, write_state

TOKENS_WANTED = 8
"""Tokens that a fit looks at for every in feature of the widest layer, if the run has had as many."""


class Finish(NamedTuple):
    """What a dense finish was made from, and what it costs.

    ``num_tokens`` were seen by the fit. ``unexplained_mean`` and
    ``unexplained_max`` are, over layers, the mean square of what the dense form misses of the experts' output, as a
    share of that output's own. ``seconds`` passed until every rank was done.
    """

    engine: DeepSpeedEngine
    num_tokens: int
    unexplained_mean: float
    unexplained_max: float
    seconds: float

    def numbers(self) -> dict[str, float]:
        """Return what a log holds."""
        return {
            "tokens": self.num_tokens,
            "unexplained_mean": self.unexplained_mean,
            "unexplained_max": self.unexplained_max,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return (
            f"fitted to {self.num_tokens} tokens in {self.seconds:.1f} s; of the experts' output a share of "
            f"{self.unexplained_mean:.3f} is lost over all layers, at most {self.unexplained_max:.3f} in one"
        )


class _Dense(NamedTuple):
    """What a layer goes on with; ``a0_RI`` where the residual takes the gates."""

    a: TensorState
    b: TensorState
    a0_RI: Tensor | None
    unexplained: float


class _Routed(NamedTuple):
    """What a layer's fit is made from; ``start`` where the residual takes the gates, ``scale_E`` for GOAT-s."""

    a: TensorState
    b: TensorState
    start: Factors | None
    scale_E: Tensor | None
    num_experts: int


class _Kept(NamedTuple):
    """By layer, who has what it goes on with, and what this rank has."""

    owners: dict[str, int]
    mine: dict[str, _Dense]
    num_tokens: int


def finish_densely(
    engine: DeepSpeedEngine,
    *,
    run: Callable[[], None],
    counts: Callable[[], bool],
    engine_config: dict[str, Any],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    rates: Rates | None = None,
) -> Finish:
    """Make the experts of an engine dense, and return a new engine that trains them on. A collective.

    Args:
        engine: Between two steps; of no use afterwards.
        run: Runs the engine over the tokens to fit to; may be called several times.
        counts: Whether the tokens that ``run`` now sends through the layers count; those of a filler do not.
        engine_config: The filled DeepSpeed config.
        schedule: As ``build_engine`` takes it.
        rates: The same.
    """
    began = time.monotonic()
    model, num_steps = engines.peft_model(engine), engine.lr_scheduler.last_epoch
    layers = {item.path: item.experts for item in named_experts(model, ADAPTER_NAME)}
    engine.eval()
    kept = _fit_all(engine, layers, run, counts)
    engines.destroy(engine)
    _drop_routers(model, layers)
    # Else the memory of two optimizers would be needed: what DeepSpeed leaves behind goes round in circles.
    gc.collect()
    train_in_units_of_a(model)
    config = engines.without_monitors(engine_config)
    engine = engines.build_engine(model, engine_config=config, schedule=schedule, rates=rates)
    engines.resume_schedule(engine, num_steps)
    for path, experts in layers.items():
        dense, owner = kept.mine.get(path), kept.owners[path]
        write_state(engine, experts.A, dense and dense.a, owner=owner)
        write_state(engine, experts.B, dense and dense.b, owner=owner)
        if experts.A0 is not None and experts.config.takes_gates:
            dense_a0 = dense and dense.a0_RI
            partition.fill_from(owner, [experts.A0], None if dense_a0 is None else [dense_a0])
    engine.train()
    mine = [dense.unexplained for dense in kept.mine.values()]
    unexplained = [value for values in ranks.gather_objects(mine) for value in values]
    return Finish(
        engine=engine,
        num_tokens=kept.num_tokens,
        unexplained_mean=sum(unexplained) / len(unexplained),
        unexplained_max=max(unexplained),
        seconds=time.monotonic() - began,
    )


def tokens_to_fit(model: PeftModel) -> int:
    """Return how many tokens a dense finish of a model wants to look at."""
    return TOKENS_WANTED * _widest(model)


def check_enough(model: PeftModel, num_tokens: int) -> None:
    """Check that a dense finish will have seen the tokens that its fit needs.

    Raises:
        ConfigError: the run has not had as many by then.
    """
    needed = TOKENS_PER_FEATURE * _widest(model)
    if num_tokens < needed:
        raise ConfigError(
            f"dense_finish comes after {num_tokens:,} tokens, and the widest layer ({_widest(model):,} in features) "
            f"needs {needed:,}; finish later, or train on more"
        )


def _widest(model: PeftModel) -> int:
    return max(item.experts.in_features for item in named_experts(model, ADAPTER_NAME))


def train_in_units_of_a(model: PeftModel) -> None:
    """Multiply the gradient of every dense ``A'`` by the mean gates, 1/E where none are shared, from here on.

    For a model without an engine.
    """
    for item in named_experts(model, ADAPTER_NAME):
        config = item.experts.config
        mean = residual_scale(1.0, r=config.r, num_experts=config.num_experts, shared_experts=config.shared_experts)
        item.experts.A.register_hook(partial(_times, factor=mean))


def _times(grad_RI: Tensor, *, factor: Tensor | float) -> Tensor:
    return grad_RI * (factor.to(grad_RI)[:, None] if isinstance(factor, Tensor) else factor)


def _fit_all(
    engine: DeepSpeedEngine,
    layers: Mapping[str, GoatExperts],
    run: Callable[[], None],
    counts: Callable[[], bool],
) -> _Kept:
    """Fit every layer on one rank, which keeps the result on the host until the new engine is there. A collective."""
    busy = [0.0] * ranks.get_world_size()
    owners: dict[str, int] = {}
    mine: dict[str, _Dense] = {}
    num_tokens = 0
    for fit_sums in fit_sums_in_passes(layers, run, counts=counts):
        here: dict[str, _Routed] = {}
        for names in by_input(fit_sums):
            owner = busy.index(min(busy))
            busy[owner] += len(names) * float(layers[names[0]].in_features) ** 3
            add_up_on(owner, [fit_sums[name] for name in names])
            num_tokens = max(num_tokens, fit_sums[names[0]].num_tokens)
            for name in names:
                owners[name] = owner
                experts = layers[name]
                routed = _read(engine, experts)
                if owner == ranks.get_rank():
                    here[name] = routed
        # A rank that fails here would leave the others waiting.
        mine |= ranks.agree(partial(_fit_here, here, fit_sums))
    return _Kept(owners, mine, num_tokens)


def _read(engine: DeepSpeedEngine, experts: GoatExperts) -> _Routed:
    """Return what a layer's fit is made from. A collective."""
    a, b, start, scale_E = read_state(engine, experts.A), read_state(engine, experts.B), None, None
    if experts.config.takes_gates:
        assert experts.A0 is not None and experts.B0 is not None
        with partition.gathered([experts.A0, experts.B0]):
            start = Factors(experts.A0.detach().float().clone(), experts.B0.detach().float().clone())
    if experts.s is not None:
        with partition.gathered([experts.s]):
            scale_E = experts.s.detach().float().clone()
    return _Routed(a, b, start, scale_E, experts.config.num_experts)


def _fit_here(here: Mapping[str, _Routed], fit_sums: Mapping[str, FitSums]) -> dict[str, _Dense]:
    if wrong := [name for name in here if not is_finite(fit_sums[name])]:
        raise TrainingError(f"dense finish: {', '.join(wrong[:8])} computed values that are not finite")
    return {name: _dense(routed, fit_sums[name]) for name, routed in here.items()}


def _dense(routed: _Routed, fit_sums: FitSums) -> _Dense:
    trained = Factors(routed.a.master, routed.b.master)
    a_RI, b_OR = gated_factors(trained, routed.start, num_experts=routed.num_experts)
    if routed.scale_E is not None:
        b_OR = b_OR * routed.scale_E.repeat_interleave(len(a_RI) // routed.num_experts)
    fit = fit_dense(a_RI, b_OR, fit_sums)
    dense_RI, dense_a0_RI = fit.a_RI.float(), None
    if routed.start is not None:
        dense_RI, dense_a0_RI = (form.cpu() for form in parted_forms(dense_RI, num_experts=routed.num_experts))
    return _Dense(_on_host(routed.a._replace(master=dense_RI)), _on_host(routed.b), dense_a0_RI, fit.unexplained)


def _on_host(state: TensorState) -> TensorState:
    return TensorState(state.master.cpu(), state.exp_avg.cpu(), state.exp_avg_sq.cpu(), state.num_steps)


def _drop_routers(model: PeftModel, layers: Mapping[str, GoatExperts]) -> None:
    configs: dict[str, Any] = model.peft_config
    config = configs[ADAPTER_NAME] = dense_goat_config(configs[ADAPTER_NAME])
    for experts in layers.values():
        experts.become_dense(config)
