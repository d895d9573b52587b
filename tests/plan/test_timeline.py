"""What is counted on tensors without memory is what a real run holds, to the byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from goat_ds import GoatConfig
from goat_ds.base.inspect import inspect
from goat_ds.data import MicroBatch, label_loss_sum
from goat_ds.plan.gathering import Gathered, follow
from goat_ds.plan.skeleton import build
from goat_ds.plan.timeline import Instant, LiveBytes, Use, record
from goat_ds.zero import sizes
from goat_ds.zero.engine import Checkpointing, enable_checkpointing
from goat_ds.zero.sizes import ZeroSizes
from tests.plan.helpers import config_only

GOAT: dict[str, Any] = {"r": 8, "num_experts": 4, "dropout": 0.1}
NUM_TOKENS, NUM_LABELS = 24, 10


def real_peaks(base: str, kind: Checkpointing, attention: str, goat: dict[str, Any] = GOAT) -> tuple[int, int]:
    """Run a micro-batch of two documents; return what is held between forward and backward, and the most."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(base), dtype=torch.bfloat16, attn_implementation=attention
    )
    model = get_peft_model(model, GoatConfig(**goat), autocast_adapter_dtype=False).train()
    enable_checkpointing(model, kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    row = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
    positions = torch.cat([torch.arange(NUM_TOKENS // 2)] * 2)[None]
    batch = MicroBatch(row, positions, row.clone(), torch.arange(NUM_LABELS), num_tokens=NUM_TOKENS, is_filler=False)
    known = [*model.parameters(), *model.buffers(), *(value for value in batch if isinstance(value, torch.Tensor))]
    with LiveBytes(known) as live:
        loss = model.base_model.with_balance_loss(label_loss_sum(model, batch))  # type: ignore[operator]
        kept = live.held
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "gated", "shared_experts": 1, "router_noise": 0.5},
        {"routing": "threshold", "expert_dropout": 0.2, "temperature": 0.5},
        {"routing": "top_p", "init": "zero", "shared_A": True},
        {"top_k": 4},
    ],
    ids=str,
)
def test_what_an_option_holds_is_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    base, bf16 = config_only(tmp_path), torch.bfloat16
    kept, peak = real_peaks(base, Checkpointing.NONE, "sdpa", GOAT | options)
    skeleton = build(
        inspect(base), GoatConfig(**GOAT | options), dtype=bf16, attention="sdpa", quantization=None, compute_dtype=bf16
    )
    timeline = record(
        skeleton.model,
        num_tokens=NUM_TOKENS,
        num_labels=NUM_LABELS,
        one_document=False,
        prepare=lambda model: enable_checkpointing(model, Checkpointing.NONE),
    )
    assert (timeline.kept, timeline.peak) == (kept, peak)


@pytest.mark.parametrize("kind", Checkpointing)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_model_of_five_blocks_holds_what_was_counted_on_three(tmp_path: Path, kind: Checkpointing, name: str) -> None:
    depth = {"n_layer": 5} if name == "gpt2" else {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    base = config_only(tmp_path, name, **depth)
    kept, peak = real_peaks(base, kind, "sdpa")
    bf16 = torch.bfloat16
    skeleton = build(
        inspect(base), GoatConfig(**GOAT), dtype=bf16, attention="sdpa", quantization=None, compute_dtype=bf16
    )
    timeline = record(
        skeleton.model,
        num_tokens=NUM_TOKENS,
        num_labels=NUM_LABELS,
        one_document=False,
        prepare=lambda model: enable_checkpointing(model, kind),
    )
    assert (timeline.kept, timeline.peak) == (kept, peak)


ZERO = sizes.read({"zero_optimization": {"stage": 3}}, model_dtype=torch.bfloat16)
NAMES = [Use(name, None) for name in "abc"]


def step_through(zero: ZeroSizes, *, persistent: bool = False) -> list[tuple[int, int]]:
    """Go forward through three layers of 100 values, then backward."""
    there = [(True, False, name) for name in NAMES], [(True, True, name) for name in reversed(NAMES)]
    instants = []
    for enters, backward, name in [*there[0], *there[1]]:
        instants.append(Instant(0, 0, enters, backward, name, (name,)))
        if not backward:
            instants.append(Instant(0, 0, False, False, name, (name,)))
    parameters = {name: Gathered(100, 100, 2, persistent) for name in NAMES}
    return [tuple(load) for load in follow(instants, parameters, zero)]  # type: ignore[misc]


def test_layers_are_whole_one_at_a_time_where_nothing_is_kept_or_asked_for_ahead() -> None:
    found = step_through(ZERO._replace(prefetch_bucket=0, max_reuse_distance=0))
    assert found == [(200, 200), (200, 0)] * 3 + [(200, 200)] * 3


def test_a_layer_that_is_used_again_soon_stays() -> None:
    found = step_through(ZERO._replace(prefetch_bucket=0))
    assert [steady for _, steady in found] == [200, 200, 400, 400, 600, 600, 600, 400, 200]


def test_layers_that_travel_together_are_there_twice_until_the_last_of_them_is_used() -> None:
    found = step_through(ZERO)
    # a; then b and c in one buffer, out of which they are copied; the buffer goes when c is used.
    assert [steady for _, steady in found[:5]] == [600, 600, 1000, 1000, 600]


def test_what_is_whole_all_the_time_is_not_gathered() -> None:
    assert step_through(ZERO, persistent=True) == [(0, 0)] * 9
