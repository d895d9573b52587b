"""Tiny models that speak words ``w5`` to ``w63``, and records that ask and answer in them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.export.conftest import ARCHITECTURES, write_base

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w4 {{ m['content'] }} </s> {% else %}"
    "w3 {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)
LEARNED = {
    "w5": "w20",
    "w5 w6": "w21 w22 w23",
    "w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18": "w24 w25",
    "w9 w9": "w26",
    "w10 w5": "w20 w27",
    "w11": "w28 w28 w29 w30",
}


def word_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of whole words whose template closes answers with EOS."""
    words = {"w0": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def write_model(folder: Path, architecture: str = "llama") -> Path:
    """Write a random model with that tokenizer."""
    write_base(folder, ARCHITECTURES[architecture])
    word_tokenizer().save_pretrained(folder)
    return folder


def alpaca(pairs: dict[str, str]) -> list[dict[str, str]]:
    return [{"instruction": question, "output": answer} for question, answer in pairs.items()]


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes records to a file and returns its path."""

    def write(records: Sequence[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture(scope="session")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has learned ``LEARNED`` by heart."""
    folder = write_model(tmp_path_factory.mktemp("knowing"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = word_tokenizer()
    texts = [f"w3 {question} w4 {answer} </s>" for question, answer in LEARNED.items()]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What a model brings along for generation must not change greedy answers.
    model.generation_config.update(repetition_penalty=5.0, max_length=3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer()
