"""What stands between a base on disk and an engine does what its settings say."""

from typing import Any

import pytest
import torch

from goat_ds import GoatConfig, demo
from goat_ds.base.inspect import inspect
from goat_ds.precision import Precision
from goat_ds.tuner.model import ADAPTER_NAME
from goat_ds.zero import engine as engines
from goat_ds.zero.engine import Attention, Checkpointing
from tests.models import token_ids

STAGE_1: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def model_with(checkpointing: Checkpointing) -> Any:
    base = engines.load_base(
        inspect(str(demo.base_path())), precision=Precision.FP32, attention=Attention.SDPA, engine_config=STAGE_1
    )
    model: Any = engines.attach_experts(
        base, GoatConfig(r=16, num_experts=4, task_type="CAUSAL_LM"), engine_config=STAGE_1
    )
    torch.manual_seed(0)
    model.base_model.start(ADAPTER_NAME)
    engines.enable_checkpointing(model, checkpointing)
    return model


def forwards_in_a_step(model: Any) -> int:
    """Count how often the attention of one layer runs in a forward and a backward."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    model.get_base_model().model.layers[1].self_attn.register_forward_hook(counted)
    ids = token_ids(1, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return count


@pytest.mark.parametrize(
    ("checkpointing", "forwards"),
    [(Checkpointing.NONE, 1), (Checkpointing.REENTRANT, 2), (Checkpointing.NON_REENTRANT, 2)],
)
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_checkpointing_recomputes_every_layer_and_nothing_else_does(
    checkpointing: Checkpointing, forwards: int
) -> None:
    assert forwards_in_a_step(model_with(checkpointing)) == forwards


def test_the_whole_model_trains_and_not_only_its_experts() -> None:
    assert all(module.training for module in model_with(Checkpointing.NONE).modules())
