"""Every architecture that users bring trains, and comes back from disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from goat_ds.tuner.layer import GoatLayer
from tests.models import CAUSAL_LMS, causal_lm, image_classifier, sequence_classifier, token_ids
from tests.tuner.helpers import goat, logits

Build = Callable[[], PreTrainedModel]


def tokens_for(name: str) -> dict[str, Tensor]:
    if name == "vit":
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator), "labels": torch.arange(3)}
    inputs = {"input_ids": token_ids(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    return inputs | {"labels": torch.arange(3) if name == "roberta" else inputs["input_ids"]}


MODELS: dict[str, tuple[Build, dict[str, object]]] = {
    **{name: (lambda name=name: causal_lm(name), {"task_type": "CAUSAL_LM"}) for name in CAUSAL_LMS},
    "roberta": (sequence_classifier, {"task_type": "SEQ_CLS"}),
    "vit": (image_classifier, {"modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_the_result_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    build, settings = MODELS[name]
    model, inputs = goat(build(), balance_coef=0.01, dropout=0.05, **settings), tokens_for(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(16):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path), **inputs), logits(model, **inputs))


@pytest.mark.parametrize(("name", "num_linear"), [("llama", 14), ("gpt2", 8), ("roberta", 12), ("vit", 12)])
def test_all_linear_layers_but_the_head_are_adapted_unless_named(name: str, num_linear: int) -> None:
    build, settings = MODELS[name]
    model = goat(build(), **settings)
    adapted = [path for path, module in model.named_modules() if isinstance(module, GoatLayer)]
    assert len(adapted) == num_linear, adapted


def test_only_the_blocks_that_are_named_are_adapted() -> None:
    model = goat(layers_to_transform=[1])
    assert {path.split(".")[4] for path, module in model.named_modules() if isinstance(module, GoatLayer)} == {"1"}


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_the_same_with_and_without_a_cache(use_cache: bool) -> None:
    model = goat().eval()
    tokens = model.generate(input_ids=token_ids(2, 5), max_new_tokens=4, do_sample=False, use_cache=use_cache)
    for position in range(5, tokens.shape[1]):
        expected = logits(model, input_ids=tokens[:, :position])[:, -1].argmax(dim=-1)
        assert torch.equal(tokens[:, position], expected)
