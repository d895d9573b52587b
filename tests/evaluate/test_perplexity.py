"""Perplexity is that of transformers' own loss, record by record, whatever rows the records are packed into."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from goat_ds.data import load_records
from goat_ds.evaluate.evaluation import lay_out
from goat_ds.evaluate.perplexity import Perplexity, perplexity
from tests.evaluate.conftest import LEARNED, alpaca, write_model


def measured(
    model: Any, file: str, tokenizer: PreTrainedTokenizerBase, scratch: Path, *, max_length: int = 64
) -> Perplexity:
    return perplexity(model, *lay_out(list(load_records([file])), tokenizer, max_length, scratch))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen2"])
def test_the_loss_is_transformers_own_over_single_records(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, write_data: Callable[..., str], name: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", name)).eval()
    found = measured(model, write_data(alpaca(LEARNED)), tokenizer, tmp_path)
    total = num_labels = 0
    for question, answer in LEARNED.items():
        ids = tokenizer(f"w3 {question} w4 {answer} </s>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[0, : len(question.split()) + 2] = -100
        count = int((labels != -100).sum())
        with torch.no_grad():
            total += count * float(model(input_ids=ids, labels=labels).loss)
        num_labels += count
    assert found.num_label_tokens == num_labels
    assert found.loss == pytest.approx(total / num_labels, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / num_labels), rel=1e-4)


def test_what_was_learned_surprises_little_and_what_was_not_surprises(
    knowing: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, write_data: Callable[..., str]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(knowing).eval()
    assert measured(model, write_data(alpaca(LEARNED)), tokenizer, tmp_path).perplexity < 1.1
    assert measured(model, write_data(alpaca({"w5": "w50"})), tokenizer, tmp_path).perplexity > 5


def test_records_that_were_cut_are_counted(
    knowing: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, write_data: Callable[..., str]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(knowing).eval()
    found = measured(model, write_data(alpaca({"w5": "w20", "w6": "w21 " * 9})), tokenizer, tmp_path, max_length=8)
    assert (found.num_truncated, found.num_label_tokens) == (1, 2 + 5)
