"""The balance loss reaches the routers' gradient, equal to plain autograd, whatever trains the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from goat_ds import with_balance_loss
from goat_ds.method.routing import BalanceWarning
from goat_ds.tuner.layer import GoatLayer
from tests.models import causal_lm, sequence_classifier, token_ids
from tests.tuner.helpers import disturb, experts_of, goat

COEF = 3.0
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def model_of(*, balance_coef: float = COEF, dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """Return a model whose experts have been trained apart, the same for the same settings."""
    torch.manual_seed(0)
    model = goat(causal_lm(dtype=dtype), balance_coef=balance_coef, **settings)
    disturb(model)
    return model.train()


def batch(*, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
    """Draw a micro-batch, with another number of label tokens for every seed."""
    ids = token_ids(2, 9, seed=seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 4 + seed :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, : 2 + seed] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@contextmanager
def slow_balance(model: PeftModel) -> Iterator[Callable[[], Tensor]]:
    """Return Σ_layers COEF L_b of the forwards inside, by plain autograd from every layer's input."""
    losses: list[Tensor] = []

    def watch(layer: GoatLayer, args: tuple[Tensor, ...], y: Tensor) -> None:
        experts, (x,) = layer.goat_experts["default"], args
        config, mask = experts.config, experts.signal.mask
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        with torch.autocast("cpu", enabled=False):
            probs = torch.softmax(x[real].to(y.dtype).to(experts.router.dtype) @ experts.router.T, dim=-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(config.top_k).indices, 1.0)
        f = config.num_experts / config.top_k * chosen.mean(dim=0)
        losses.append(COEF * (f * probs.mean(dim=0)).sum())

    layers = [module for module in model.modules() if isinstance(module, GoatLayer)]
    hooks = [layer.register_forward_hook(watch) for layer in layers]  # type: ignore[arg-type]
    yield lambda: torch.stack(losses).sum()
    for hook in hooks:
        hook.remove()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Take the gradients of everything that trains."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def slow_gradients(batches: list[dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
    """Sum cross-entropy and balance loss over micro-batches by plain autograd: ours is off, the slow one is added."""
    model = model_of(balance_coef=0.0, **settings)
    for inputs in batches:
        with slow_balance(model) as balance:
            loss = model(**inputs).loss
        (loss + balance()).backward()
    return gradients(model)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Compare all gradients, of which there must be as many."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], **(tolerance or EXACT), msg=lambda m, name=name: f"{name}: {m}"
        )


CHECKPOINTING = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
}


def checkpointed(model: PeftModel, how: str) -> PeftModel:
    """Switch gradient checkpointing on as trainers do."""
    if how != "none":
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable(CHECKPOINTING[how])
    return model


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_gradients_equal_plain_autograds(task_type: str | None, padded: bool, how: str) -> None:
    model = checkpointed(model_of(task_type=task_type), how)
    model(**batch(padded=padded)).loss.backward()
    assert_equal(gradients(model), slow_gradients([batch(padded=padded)], task_type=task_type))


def test_gradients_equal_plain_autograds_where_peft_goes_around_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    # As PEFT's tuners called the base before 0.21.
    monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
    model = model_of(task_type="CAUSAL_LM")
    model(**batch(padded=True)).loss.backward()
    assert_equal(gradients(model), slow_gradients([batch(padded=True)], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize(
    "settings", [{"adaptive_scale": True}, {"init": "zero"}, {"top_k": 4}, {"residual": "fold"}], ids=str
)
def test_gradients_equal_plain_autograds_for_every_kind_of_adapter(settings: dict[str, Any], how: str) -> None:
    model = checkpointed(model_of(**settings), how)
    model(**batch(padded=True)).loss.backward()
    assert_equal(gradients(model), slow_gradients([batch(padded=True)], **settings))


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_gradients_accumulate_over_micro_batches(how: str) -> None:
    batches = [batch(seed=seed, padded=True) for seed in range(3)]
    model = checkpointed(model_of(), how)
    for inputs in batches:
        model(**inputs).loss.backward()
    assert_equal(gradients(model), slow_gradients(batches))


def test_two_forwards_before_one_backward_each_keep_their_own() -> None:
    batches = [batch(seed=seed, padded=True) for seed in range(2)]
    model = model_of()
    sum(model(**inputs).loss for inputs in batches).backward()
    assert_equal(gradients(model), slow_gradients(batches))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # nor should they, in the reference
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_a_forward_of_a_reference_in_between_changes_nothing(how: str) -> None:
    model = checkpointed(model_of(), how)
    loss = model(**batch(padded=True)).loss
    with torch.no_grad(), model.disable_adapter():
        model(**batch(seed=1))
    loss.backward()
    assert_equal(gradients(model), slow_gradients([batch(padded=True)]))


def test_the_loss_is_cross_entropy_plus_the_balance_loss_and_evaluation_is_cross_entropy_alone() -> None:
    model = model_of()
    with slow_balance(model) as balance:
        output = model(**batch(padded=True))
    torch.testing.assert_close(model.base_model.balance_loss(), balance().detach())
    assert output.loss > balance()
    with torch.no_grad():
        cross_entropy = model.eval()(**batch(padded=True)).loss
    torch.testing.assert_close(output.loss - balance().float(), cross_entropy)


def test_a_loss_scale_scales_the_balance_gradient_too() -> None:
    model, scaled = model_of(), model_of()
    model(**batch()).loss.backward()
    (1024 * scaled(**batch()).loss).backward()
    assert_equal({name: g / 1024 for name, g in gradients(scaled).items()}, gradients(model))


def test_under_autocast_the_balance_gradient_is_the_slow_one_up_to_bf16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = model_of(dtype=torch.float32)
        model(**batch(padded=True)).loss.backward()
        expected = slow_gradients([batch(padded=True)], dtype=torch.float32)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_a_mask_given_by_position_counts() -> None:
    inputs = batch(padded=True)
    model = model_of()
    model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss.backward()
    assert_equal(gradients(model), slow_gradients([inputs]))


def outside_loss(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the cross-entropy from logits, as a trainer of its own may."""
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    logits = output.logits[:, :-1].float()  # transformers takes every cross-entropy in fp32
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_a_loss_computed_outside_of_the_model_warns_that_balance_is_lost() -> None:
    model = model_of()
    with pytest.warns(BalanceWarning, match=r"wrap your loss: loss = goat_ds\.with_balance_loss\(model, loss\)"):
        outside_loss(model, batch()).backward()


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_wrapping_a_loss_computed_outside_brings_the_balance_back(how: str) -> None:
    model = checkpointed(model_of(), how)
    with_balance_loss(model, outside_loss(model, batch(padded=True))).backward()
    assert_equal(gradients(model), slow_gradients([batch(padded=True)]))


def test_evaluation_and_a_coefficient_of_zero_need_no_carrying() -> None:
    outside_loss(model_of(balance_coef=0.0), batch()).backward()
    outside_loss(model_of().eval(), batch()).backward()


def test_a_frozen_router_adds_nothing_to_loss_and_gradient() -> None:
    frozen, off = model_of(), model_of(balance_coef=0.0)
    for model in (frozen, off):
        for experts in experts_of(model):
            experts.router.requires_grad_(False)
    losses = [model(**batch()).loss for model in (frozen, off)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_equal(gradients(frozen), gradients(off))


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_neither_loss_nor_gradient_under_dropout(how: str) -> None:
    found = []
    for kind in ("none", how):
        model = checkpointed(model_of(dropout=0.3), kind)
        torch.manual_seed(7)
        loss = model(**batch(padded=True)).loss
        loss.backward()
        found.append((loss, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert_equal(found[1][1], found[0][1])


def test_a_pooled_head_is_balanced_over_its_own_rows() -> None:
    torch.manual_seed(0)
    model = goat(sequence_classifier(), target_modules=["dense"], balance_coef=COEF).train()
    inputs = {name: value for name, value in batch(padded=True).items() if name != "labels"}
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    loads = model.base_model.signal.loads
    assert loads["classifier.dense"].share_E.sum().item() == pytest.approx(1)
