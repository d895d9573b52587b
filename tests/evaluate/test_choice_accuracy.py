"""The most likely choice is found as by separate forward passes, one for each choice of each question."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from goat_ds.data import IGNORE
from goat_ds.evaluate.choice_accuracy import choice_accuracy, log_likelihoods
from goat_ds.evaluate.questions import Candidates, Question, candidates_of
from tests.evaluate.conftest import LEARNED, write_model

CHOICES = ["w20", "w20 w21", "w40 w41 w42 w43", "w33 w34"]
TEXTS = ["w5", " ".join(f"w{i}" for i in range(5, 30)), "w6 w7 w8", "w9 w9 w9 w9 w9 w9 w9"]


def questions(texts: list[str], answers: list[str]) -> list[Question]:
    return [Question("here", [{"role": "user", "content": t}], a) for t, a in zip(texts, answers, strict=True)]


def slow_log_likelihood(model: Any, question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """Sum the log-probabilities of an answer and its end, from one forward of the whole text."""
    prompt = tokenizer(f"w3 {question} w4")["input_ids"]
    whole = tokenizer(f"w3 {question} w4 {answer} </s>")["input_ids"]
    with torch.no_grad():
        log_probs_TV = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    return float(sum(log_probs_TV[place - 1, whole[place]] for place in range(len(prompt), len(whole))))


def slow_table(model: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor([[slow_log_likelihood(model, text, c, tokenizer) for c in CHOICES] for text in TEXTS])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3", "gpt2", "mixtral", "gpt_neox"])
def test_log_likelihoods_are_those_of_separate_forward_passes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", name)).eval()
    candidates = candidates_of(questions(TEXTS, CHOICES), CHOICES, tokenizer)
    torch.testing.assert_close(log_likelihoods(model, candidates), slow_table(model, tokenizer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_both_accuracies_are_counted_as_by_hand(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model")).eval()
    table_NC, lengths_C = slow_table(model, tokenizer), torch.tensor([len(c.split()) + 1 for c in CHOICES])
    by_sum, per_token = table_NC.argmax(1).tolist(), (table_NC / lengths_C).argmax(1).tolist()
    assert by_sum != per_token
    answers = [CHOICES[place] for place in per_token]
    candidates = candidates_of(questions(TEXTS, answers), CHOICES, tokenizer)
    found = choice_accuracy(model, candidates, CHOICES, batch_size=batch_size)
    agreeing = sum(a == b for a, b in zip(by_sum, per_token, strict=True))
    assert found == (agreeing / 4, 1.0, agreeing, 4, 4, CHOICES)


def test_a_model_that_has_learned_the_answers_chooses_them(knowing: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(knowing).eval()
    choices = list(LEARNED.values())
    candidates = candidates_of(questions(list(LEARNED), choices), choices, tokenizer)
    found = choice_accuracy(model, candidates, choices, batch_size=4)
    assert found.accuracy == found.accuracy_per_token == 1.0


def test_the_prompt_of_a_question_runs_once(knowing: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(knowing).eval()
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    log_likelihoods(model, candidates_of(questions(TEXTS, CHOICES), CHOICES, tokenizer))
    # 25 words and two marks of the template; the longest choice but its closing token.
    assert shapes == [(4, 27), (16, 4)]


def test_what_a_template_writes_before_an_answer_because_of_it_is_given_and_not_scored(
    knowing: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(knowing).eval()
    ways = [
        Candidates([3, 5], [[4, 20, 2], [31, 4, 21, 22, 2]], [[IGNORE, 20, 2], [IGNORE, IGNORE, 21, 22, 2]], 0),
    ]
    with torch.no_grad():
        short, long = (
            model(input_ids=torch.tensor([[3, 5, *rest]])).logits[0].log_softmax(-1) for rest in ways[0].rests
        )
    expected = [short[2, 20] + short[3, 2], long[3, 21] + long[4, 22] + long[5, 2]]
    torch.testing.assert_close(log_likelihoods(model, ways)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)
