"""Hugging Face's Trainer and TRL's SFTTrainer train the routers' balance too, with nothing said to them."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from goat_ds import GoatConfig
from goat_ds.method.routing import BalanceWarning
from tests.models import causal_lm, sequence_classifier, token_ids
from tests.tuner.helpers import SMALL, disturb, goat
from tests.tuner.test_balance import COEF, batch, slow_balance

# trl 1.16 knows checkpointing by the name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")

NUM_MICRO_BATCHES = 2


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Copy them."""
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return one step of two micro-batches on the CPU, written nowhere."""
    return {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no",
        "gradient_accumulation_steps": NUM_MICRO_BATCHES, "report_to": [], "use_cpu": True, "max_grad_norm": 0.0,
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
    } | settings  # fmt: skip


def model_of(*, balance_coef: float = COEF) -> PeftModel:
    model = goat(causal_lm(), balance_coef=balance_coef)
    disturb(model)
    return model.train()


def in_order(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor[row] for name, tensor in inputs.items()} for inputs in batches for row in range(2)]


class InOrder(Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.SequentialSampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def num_labels(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def slow_update(batches: list[dict[str, Tensor]], *, learning_rate: float) -> dict[str, Tensor]:
    """Take one SGD step on Σ_micro share (cross-entropy + Σ_layers COEF L_b), share by label tokens, by hand."""
    model = model_of(balance_coef=0.0)
    for inputs in batches:
        share = num_labels(inputs) / sum(map(num_labels, batches))
        with slow_balance(model) as balance:
            loss = model(**inputs).loss
        (share * (loss + balance())).backward()
    return {name: p - learning_rate * p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_trainer_takes_the_step_of_a_loop_written_by_hand(tmp_path: Path, checkpointing: bool | None) -> None:
    batches = [batch(seed=seed, padded=True) for seed in range(NUM_MICRO_BATCHES)]
    settings = {"gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}  # type: ignore[assignment]
    model = model_of()
    InOrder(model, TrainingArguments(**arguments(tmp_path, **settings)), train_dataset=in_order(batches)).train()
    after = dict(model.named_parameters())
    for name, expected in slow_update(batches, learning_rate=0.1).items():
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_a_loss_of_the_trainers_own_warns_that_balance_is_lost(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.warns(BalanceWarning, match="computed outside of the model"):
        InOrder(model_of(), args, train_dataset=in_order([batch(), batch(seed=1)])).train()


def test_every_sequence_of_a_classifier_counts_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = goat(sequence_classifier(), task_type="SEQ_CLS", balance_coef=COEF)
    weights: list[float] = []
    carry = model.base_model.with_balance_loss

    def watch(loss: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
        weights.append(float(weight))
        return carry(loss, weight=weight)

    model.base_model.with_balance_loss = watch
    rows = [{"input_ids": token_ids(9, seed=seed), "labels": torch.tensor(seed % 3)} for seed in range(4)]
    InOrder(model, TrainingArguments(**arguments(tmp_path)), train_dataset=rows).train()
    assert weights == [1 / NUM_MICRO_BATCHES] * NUM_MICRO_BATCHES


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 64 words, w0 to w63, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def sft_gradients(
    folder: Path, *, balance_coef: float, dtype: torch.dtype, **settings: Any
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], PeftModel]:
    """Return the gradients of TRL's first step, its micro-batches, and the model after it (whose step is zero)."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install goat_ds[trl]")
    rows = [{"text": " ".join(f"w{token}" for token in token_ids(5 + 2 * seed, seed=seed))} for seed in range(4)]
    torch.manual_seed(0)
    keep, batches = KeepGradients(), []
    given = arguments(folder, gradient_checkpointing=False, learning_rate=0.0, bf16=False) | settings
    trainer = trl.SFTTrainer(
        model=causal_lm(dtype=dtype),
        args=trl.SFTConfig(**given),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=GoatConfig(**SMALL, balance_coef=balance_coef),
        callbacks=[keep],
    )
    compute_loss = trainer.compute_loss

    def watch(model: nn.Module, inputs: dict[str, Tensor], **others: Any) -> Tensor:
        batches.append({name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
        return compute_loss(model, inputs, **others)

    trainer.compute_loss = watch
    trainer.train()
    return keep.found, batches, trainer.model


CHECKPOINTED = {
    "plain": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("how", CHECKPOINTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sft_trainer_balances_the_routers_as_plain_autograd_does(tmp_path: Path, dtype: torch.dtype, how: str) -> None:
    found, _, _ = sft_gradients(tmp_path, balance_coef=COEF, dtype=dtype, **CHECKPOINTED[how])
    without, batches, model = sft_gradients(tmp_path, balance_coef=0.0, dtype=dtype)
    model.train().zero_grad()
    for inputs in batches:
        share = num_labels(inputs) / sum(map(num_labels, batches))
        with slow_balance(model) as balance:
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        (share * balance()).backward()
    by_balance = {name: p.grad for name, p in model.named_parameters() if "router" in name}
    assert len(batches) == NUM_MICRO_BATCHES and found.keys() == without.keys()
    for name, expected in by_balance.items():
        difference = found[name] - without[name]
        assert expected is not None and expected.norm() > 0
        assert (difference - expected).norm() < (1e-4 if dtype == torch.float32 else 0.05) * expected.norm(), name


def test_sft_trainer_leaves_an_adapter_that_loads(tmp_path: Path) -> None:
    _, _, model = sft_gradients(tmp_path / "run", balance_coef=1e-3, dtype=torch.float32, learning_rate=0.1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(2, 5)).logits, model.eval()(token_ids(2, 5)).logits)
