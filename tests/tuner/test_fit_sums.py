"""What the dense form needs is gathered from real tokens, once for layers that see the same input."""

from functools import partial
from typing import Any

import peft
import pytest
import torch

from goat_ds import ConfigError, GoatConfig
from goat_ds.method.dense_fit import FitSums
from goat_ds.tuner.fit_sums import fit_sums_in_passes
from goat_ds.tuner.model import named_experts
from tests.models import causal_lm, token_ids

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def routed() -> Any:
    config = GoatConfig(r=8, num_experts=4, top_k=2, task_type="CAUSAL_LM")
    return peft.get_peft_model(causal_lm(), config, autocast_adapter_dtype=False).eval()


def sums_of(model: Any, **inputs: Any) -> dict[str, FitSums]:
    layers = {item.path: item.experts for item in named_experts(model, "default")}
    (sums,) = [dict(found) for found in fit_sums_in_passes(layers, partial(model, **inputs))]
    return sums


def test_padding_is_not_counted() -> None:
    model, ids = routed(), token_ids(2, 12)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 3)], dim=1).long()
    alone, beside = sums_of(model, input_ids=ids), sums_of(model, input_ids=padded, attention_mask=mask)
    assert alone.keys() == beside.keys()
    for path, own in alone.items():
        assert own.num_tokens == beside[path].num_tokens == 24
        torch.testing.assert_close(own.xx_II, beside[path].xx_II, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.hx_RI, beside[path].hx_RI, rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_count_leave_no_trace() -> None:
    model = routed()
    layers = {item.path: item.experts for item in named_experts(model, "default")}
    counting = True

    def run() -> None:
        nonlocal counting
        for tokens, counting in ((token_ids(1, 2, seed=1), False), (token_ids(1, 9), True)):  # noqa: B007
            model(input_ids=tokens)

    (found,) = [dict(some) for some in fit_sums_in_passes(layers, run, counts=lambda: counting)]
    for path, expected in sums_of(model, input_ids=token_ids(1, 9)).items():
        assert found[path].num_tokens == expected.num_tokens == 9
        for one, other in zip(vars(found[path]).values(), vars(expected).values(), strict=True):
            torch.testing.assert_close(one, other)


def test_a_layer_that_no_token_reaches_is_named() -> None:
    model = routed()
    layers = {item.path: item.experts for item in named_experts(model, "default")}
    with pytest.raises(ConfigError, match=r"no token passes through .*q_proj.*; put layers that"):
        list(fit_sums_in_passes(layers, lambda: None))


def test_layers_with_the_same_input_hold_its_sum_once() -> None:
    sums = sums_of(routed(), input_ids=token_ids(1, 12))
    sums = {path.removeprefix("base_model.model.model.layers.0."): own.xx_II for path, own in sums.items()}
    q, k, v, gate, up = (
        sums[name] for name in (*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj")
    )
    assert q is k and k is v and gate is up and q is not gate
    # Every token counts once, with the size that its norm gave it.
    assert q.trace() == pytest.approx(12 * 32, rel=0.01)


def test_gathering_leaves_no_hook_behind() -> None:
    model = routed()
    sums_of(model, input_ids=token_ids(1, 12))
    assert not any(item.experts._forward_pre_hooks for item in named_experts(model, "default"))


def test_static_experts_cannot_be_started() -> None:
    with pytest.raises(ConfigError, match=r"routed \(False\) is what a trained mixture becomes and cannot be started"):
        GoatConfig(routed=False)
