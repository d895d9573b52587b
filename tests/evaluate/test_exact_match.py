"""An answer counts when it is the record's to the letter, whatever stands beside it in the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from goat_ds.data import load_records, stop_ids
from goat_ds.evaluate.exact_match import ExactMatch, exact_match, left_padded
from goat_ds.evaluate.questions import Prompt, prompts_of, questions_of
from tests.evaluate.conftest import LEARNED, alpaca, write_model

Write = Callable[..., str]


def prompts(file: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    return prompts_of(questions_of(load_records([file])), tokenizer)


def judged(model: Any, asked: list[Prompt], tokenizer: PreTrainedTokenizerBase, **settings: int) -> ExactMatch:
    return exact_match(model, asked, tokenizer, **({"batch_size": 4, "max_new_tokens": 8} | settings))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_model_that_has_learned_the_answers_has_them_all(
    knowing: Path, tokenizer: PreTrainedTokenizerBase, write_data: Write, batch_size: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(knowing).eval()
    asked = prompts(write_data(alpaca(LEARNED)), tokenizer)
    assert judged(model, asked, tokenizer, batch_size=batch_size) == (1.0, len(LEARNED), len(LEARNED))


def test_an_answer_that_is_cut_continued_or_changed_is_wrong(
    knowing: Path, tokenizer: PreTrainedTokenizerBase, write_data: Write
) -> None:
    model = AutoModelForCausalLM.from_pretrained(knowing).eval()
    wrong = {"w5": "w20 w20", "w5 w6": "w21 w22", "w9 w9": "w27", "w11": "  w28 w28 w29 w30\n"}
    asked = prompts(write_data(alpaca(LEARNED | wrong)), tokenizer)
    # White space around an answer is not part of it.
    assert judged(model, asked, tokenizer).num_right == len(LEARNED) - 3


def test_an_answer_that_has_not_ended_is_taken_as_far_as_it_went(
    knowing: Path, tokenizer: PreTrainedTokenizerBase, write_data: Write
) -> None:
    model = AutoModelForCausalLM.from_pretrained(knowing).eval()
    asked = prompts(write_data(alpaca({"w11": "w28 w28 w29 w30", "w5": "w20"})), tokenizer)
    assert judged(model, asked, tokenizer, max_new_tokens=2).num_right == 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3", "mixtral", "gpt_neox"])
def test_batched_answers_are_those_of_a_slow_loop(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, write_data: Write, name: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", name)).eval()
    questions = [" ".join(f"w{5 + (7 * i + j) % 50}" for j in range(i % 11 + 1)) for i in range(12)]
    pairs = {question: slow_answer(model, f"w3 {question} w4", tokenizer) for question in questions}
    changed = dict.fromkeys(questions[:3], "w63 w63 w63")
    asked = prompts(write_data(alpaca(pairs | changed)), tokenizer)
    assert judged(model, asked, tokenizer, max_new_tokens=6) == (0.75, 9, 12)


def slow_answer(model: Any, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Answer greedily, the whole sequence again for every token."""
    ids = tokenizer(prompt)["input_ids"]
    given: list[int] = []
    while len(given) < 6:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + given]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids(tokenizer):
            break
        given.append(token)
    return tokenizer.decode(given)


def test_padding_stands_before_and_is_masked() -> None:
    padded = left_padded([[5, 6, 7], [8]], device=torch.device("cpu"))
    assert padded.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert padded.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
