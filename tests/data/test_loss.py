"""Packing and label-only logits change nothing; the loss of a step is the mean over its label tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, GraniteConfig, PretrainedConfig

from benchmarks.live_tensors import LiveTensors
from goat_ds.data import loss as losses
from goat_ds.data.batches import MicroBatch
from goat_ds.data.loss import cross_entropy_sum, in_chunks, label_loss_sum
from tests.models import CAUSAL_LMS, COMMON, LLAMA_LIKE, causal_lm, token_ids

LENGTHS = [7, 1, 11, 3]
HEADS: dict[str, PretrainedConfig] = {  # what architectures do with logits
    "softcapping": Gemma2Config(**LLAMA_LIKE, final_logit_softcapping=2.0),
    "division": GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0),
    "scaling": CohereConfig(**LLAMA_LIKE, logit_scale=0.3),
    "bias": GPTJConfig(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
}


def packed_row(documents: list[torch.Tensor]) -> MicroBatch:
    ids = torch.cat(documents)[None]
    labels = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents])[None]
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None],
        labels=labels,
        label_index=(labels[0] != -100).nonzero()[:, 0],
        num_tokens=ids.numel(),
        is_filler=False,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_packed_logits_equal_unpacked_ones(name: str, attention: str) -> None:
    model: Any = causal_lm(name).eval()
    model.set_attn_implementation(attention)
    documents = [token_ids(length, seed=length) for length in LENGTHS]
    row = packed_row(documents)
    with torch.no_grad():
        packed = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_logits_at_labels_only_give_the_same_loss(name: str) -> None:
    model: Any = causal_lm(name).eval()
    row = packed_row([token_ids(length, seed=length) for length in LENGTHS])
    with torch.no_grad():
        logits = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits
        expected = functional.cross_entropy(logits[0].float(), row.labels[0], ignore_index=-100, reduction="sum")
        torch.testing.assert_close(label_loss_sum(model, row), expected)


def drawn(num_labels: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(num_labels, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(vocabulary, (num_labels,), generator=generator)


def with_gradient(loss: Any, logits: Tensor, targets: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a loss and its gradient with respect to logits, which are left as they are."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf * 1, targets)
    value.backward(torch.tensor(scale, dtype=value.dtype))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def at_once(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def by_hand(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in float64 and its gradient, one label after the other."""
    value, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(logits, dtype=torch.float64)
    for row, (scores, target) in enumerate(zip(logits.double(), targets.tolist(), strict=True)):
        probabilities = scores.exp() / scores.exp().sum()
        value -= probabilities[target].log()
        gradient[row] = probabilities
        gradient[row, target] -= 1
    return value, gradient


@pytest.mark.parametrize("num_labels", [1, 6, 7])  # with 3 in a chunk: less than one, full ones, and a rest
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_in_chunks_is_that_of_slow_loops(
    dtype: torch.dtype, num_labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_VALUES", 3 * 50 + 49)
    logits, targets = drawn(num_labels, 50, dtype)
    assert len(list(in_chunks(logits, targets))) == -(-num_labels // 3)
    value, gradient = with_gradient(cross_entropy_sum, logits, targets, scale=7.0)
    expected, expected_gradient = by_hand(logits, targets)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    torch.testing.assert_close(value, expected.to(value.dtype))
    # Rounded once: half a unit in the last place, and what fp32 itself is off by.
    unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(gradient.double(), 7.0 * expected_gradient, rtol=1.01 * unit, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_are_no_less_exact_than_all_logits_at_once(dtype: torch.dtype) -> None:
    logits, targets = drawn(64, 4096, dtype)
    expected, expected_gradient = by_hand(logits, targets)
    errors = []
    for loss in (cross_entropy_sum, at_once):
        value, gradient = with_gradient(loss, logits, targets)
        errors.append(((value - expected).abs(), (gradient - expected_gradient).norm()))
    (in_value, in_gradient), (at_once_in_value, at_once_in_gradient) = errors
    assert in_value <= at_once_in_value + 1e-7 * expected
    assert in_gradient <= 1.001 * at_once_in_gradient


@pytest.mark.parametrize("vocabulary", [50, 300])
def test_a_position_that_is_ignored_has_no_loss_and_no_gradient(vocabulary: int) -> None:
    logits, targets = drawn(6, vocabulary, torch.float32)
    targets[[1, 4]] = -100
    value, gradient = with_gradient(cross_entropy_sum, logits, targets)
    expected, expected_gradient = with_gradient(at_once, logits, targets)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not gradient[[1, 4]].any()


def test_a_loss_scale_keeps_small_gradients_in_fp16() -> None:
    logits, targets = torch.zeros(2, 2**17, dtype=torch.float16), torch.tensor([5, 7])
    _, gradient = with_gradient(cross_entropy_sum, logits, targets, scale=2.0**14)
    assert gradient[0, 0] == 2.0**-3


def test_forward_and_backward_make_nothing_larger_than_a_few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_VALUES", 4096)
    logits, targets = drawn(64, 4096, torch.bfloat16)
    logits.requires_grad_()
    with LiveTensors() as live:
        torch.autograd.grad(at_once(logits, targets), logits)
    assert live.peak >= 4 * logits.nbytes
    with LiveTensors() as live:
        torch.autograd.grad(cross_entropy_sum(logits, targets), logits)
    assert live.peak <= 4 * (4 * 4096)


def test_an_evaluation_leaves_the_logits_as_they_are() -> None:
    logits, targets = drawn(5, 50, torch.bfloat16)
    before = logits.clone()
    loss = cross_entropy_sum(logits, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, at_once(logits, targets))
    assert torch.equal(logits, before)


def test_what_needs_the_logits_after_backward_is_refused() -> None:
    logits, targets = drawn(5, 50, torch.float32)
    loss = cross_entropy_sum(logits.requires_grad_() * 1, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    kept_by_tanh = cross_entropy_sum(logits.tanh(), targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept_by_tanh.backward()


def test_a_gradient_of_the_gradient_is_refused() -> None:
    logits, targets = drawn(5, 50, torch.float32)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy_sum(leaf * 1, targets).square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", [*CAUSAL_LMS, *HEADS])
def test_training_on_labels_only_gives_the_gradients_of_full_logits(name: str) -> None:
    torch.manual_seed(0)
    model: Any = causal_lm(name) if name in CAUSAL_LMS else AutoModelForCausalLM.from_config(HEADS[name])
    row = packed_row([token_ids(length, seed=length) for length in LENGTHS])
    model.eval()
    logits = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits
    functional.cross_entropy(logits[0], row.labels[0], ignore_index=-100, reduction="sum").backward()
    expected = {path: parameter.grad for path, parameter in model.named_parameters()}
    model.zero_grad()
    label_loss_sum(model, row).backward()
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path], rtol=1e-4, atol=1e-5)


def test_a_row_without_labels_has_no_loss_and_no_gradient() -> None:
    model: Any = causal_lm()
    row = packed_row([token_ids(1)])
    loss = label_loss_sum(model, row)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
