"""What is asked is how training sequences begin, and choices are the same for all records."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from goat_ds.data import IGNORE, Dropped, DropReason, Record, prompt_ids
from goat_ds.errors import ConfigError
from goat_ds.evaluate.questions import Question, candidates_of, choices_of, prompts_of, questions_of
from tests.data.conftest import byte_bpe
from tests.evaluate.conftest import word_tokenizer


def question(text: str, answer: str, origin: str = "here") -> Question:
    return Question(origin, [{"role": "user", "content": text}], answer)


def test_the_last_answer_of_a_conversation_is_asked_for() -> None:
    chat: list[Any] = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
        {"role": "assistant", "content": " w8\n"},
    ]
    records = [Record("a", chat, ""), Record("b", [], "text"), Dropped("c", DropReason.NO_ANSWER)]
    assert questions_of(records) == [Question("a", chat[:3], "w8")]


@pytest.mark.parametrize("make", [word_tokenizer, byte_bpe])
def test_prompts_and_what_candidates_share_are_the_prompts_of_training(make: Any) -> None:
    tokenizer = make()
    asked = [question("w5 w6", "w8"), question("w7", "w9")]
    prompts = prompts_of(asked, tokenizer)
    assert [prompt.input_ids for prompt in prompts] == [prompt_ids(q.messages, tokenizer) for q in asked]
    candidates = candidates_of(asked, ["w8", "w9"], tokenizer)
    assert [candidate.shared for candidate in candidates] == [prompt.input_ids for prompt in prompts]
    assert [candidate.right for candidate in candidates] == [0, 1]


def test_a_candidate_ends_with_what_closes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [question("w5", "w8 w9")]
    (found,) = candidates_of(asked, ["w8", "w8 w9"], tokenizer)
    assert (found.shared, found.rests) == ([3, 5, 4], [[8, 2], [8, 9, 2]])
    assert found.labels == found.rests and found.right == 1


def test_only_the_last_answer_of_a_conversation_is_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    chat: list[Any] = [
        *question("w5", "").messages,
        {"role": "assistant", "content": "w6"},
        *question("w7", "").messages,
    ]
    (found,) = candidates_of([Question("a", chat, "w8")], ["w8", "w9"], tokenizer)
    assert found.shared == [3, 5, 4, 6, 2, 3, 7, 4]
    assert found.labels == [[8, 2], [9, 2]]


def test_a_template_that_thinks_before_some_answers_shares_less() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w4 {% if 'w9' in m['content'] %}w31 {% endif %}"
        "{% generation %}{{ m['content'] }} </s>{% endgeneration %}{% else %}w3 {{ m['content'] }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    )
    (found,) = candidates_of([question("w5", "w8")], ["w8", "w9"], tokenizer)
    assert (found.shared, found.rests) == ([3, 5, 4], [[8, 2], [31, 9, 2]])
    assert found.labels == [[8, 2], [IGNORE, 9, 2]]


def test_choices_are_those_named_or_the_different_answers() -> None:
    asked = [question("w5", "yes"), question("w6", "no"), question("w7", "yes")]
    assert choices_of(asked, []) == ["no", "yes"]
    assert choices_of(asked, ["yes ", "no", "maybe", "no"]) == ["yes", "no", "maybe"]


def test_an_answer_that_is_no_choice_is_refused_with_its_place() -> None:
    asked = [question("w5", "yes"), question("w6", "No", origin="data.jsonl line 2")]
    with pytest.raises(ConfigError, match=r"data.jsonl line 2: the answer 'No' is none of choices \(yes, no\)"):
        choices_of(asked, ["yes", "no"])


@pytest.mark.parametrize("answers", [["one"], [f"w{i}" for i in range(17)]])
def test_too_few_and_too_many_different_answers_are_no_choices(answers: list[str]) -> None:
    words = rf"where they are 2 to 16, and these are {len(answers)}; name them with --choices, or leave the metric out"
    with pytest.raises(ConfigError, match=words):
        choices_of([question("w5", answer) for answer in answers], [])


def test_what_a_template_refuses_is_told_with_its_place() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'w6' %}{{ raise_exception('never w6') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    asked = [question("w5", "w8"), question("w6", "w9", origin="data.jsonl line 2")]
    for lay_out in (lambda: prompts_of(asked, tokenizer), lambda: candidates_of(asked, ["w8", "w9"], tokenizer)):
        with pytest.raises(
            ConfigError, match=r"^data.jsonl line 2: the tokenizer's chat template refuses .* never w6$"
        ):
            lay_out()
