"""Every format comes to the same record; what is wrong and what is dropped."""

import pytest

from goat_ds.data.formats import DataFormat, Dropped, DropReason, Record, convert, first_problems, recognise
from goat_ds.errors import ConfigError

QUESTION = {"role": "user", "content": "why"}
ANSWER = {"role": "assistant", "content": "so"}

SAME_CONVERSATION = {
    DataFormat.ALPACA: {"instruction": "why", "input": "", "output": "so"},
    DataFormat.SHAREGPT: {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
    DataFormat.MESSAGES: {"messages": [QUESTION, ANSWER]},
    DataFormat.PROMPT_COMPLETION: {"prompt": "why", "completion": "so"},
}


def read(raw, data_format=None):
    return convert(raw, data_format=data_format, origin="train.jsonl line 17")


@pytest.mark.parametrize("data_format", SAME_CONVERSATION)
def test_the_same_conversation_is_the_same_in_every_format(data_format):
    raw = SAME_CONVERSATION[data_format]
    assert recognise(raw) is data_format
    assert read(raw) == read(raw, data_format) == Record("train.jsonl line 17", [QUESTION, ANSWER], "")


def test_prompt_and_completion_may_be_lists_of_messages():
    assert read({"prompt": [QUESTION], "completion": [ANSWER]}).messages == [QUESTION, ANSWER]


def test_a_text_stays_as_it_is():
    assert read({"text": " the cat\n"}) == Record("train.jsonl line 17", [], " the cat\n")


def test_the_parts_win_over_a_ready_made_text_column():
    assert recognise(["instruction", "input", "output", "text"]) is DataFormat.ALPACA


def test_columns_that_are_null_in_this_row_do_not_decide_its_format():
    assert read({"messages": None, "text": "the cat", "prompt": None, "completion": None}).text == "the cat"


def test_input_is_kept_apart_and_a_system_column_goes_first():
    record = read({"instruction": "why", "input": "the cat", "output": "so", "system": "be brief"})
    assert record.messages == [{"role": "system", "content": "be brief"}, {**QUESTION, "input": "the cat"}, ANSWER]


def test_messages_after_the_last_answer_are_cut_off():
    assert read({"messages": [QUESTION, ANSWER, QUESTION]}).messages == [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"text": " \n"}, DropReason.EMPTY_TEXT),
        ({"instruction": "why", "output": " "}, DropReason.EMPTY_ANSWER),
        ({"instruction": "why", "output": None}, DropReason.EMPTY_ANSWER),
        ({"messages": [QUESTION, {**ANSWER, "content": ""}, QUESTION, ANSWER]}, DropReason.EMPTY_ANSWER),
        ({"messages": [QUESTION]}, DropReason.NO_ANSWER),
        ({"conversations": []}, DropReason.NO_ANSWER),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, DropReason.NO_QUESTION),
        ({"instruction": "", "input": "", "output": "so"}, DropReason.NO_QUESTION),
    ],
)
def test_a_right_record_with_nothing_to_learn_is_dropped_with_its_reason(raw, reason):
    assert read(raw) == Dropped("train.jsonl line 17", reason)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"question": "why"}, r'neither "messages", "conversations", .* nor "text": it has "question"'),
        ([1, 2], "must be an object with named fields, not a list"),
        ({"instruction": "why", "output": 7}, '"output" must be text, not a number'),
        ({"messages": "why"}, '"messages" must be a list of messages, not text'),
        ({"messages": [{"role": "cat", "content": "so"}]}, r'messages\[0\]: "role" is \'cat\', none of human, user'),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r'messages\[1\]: "content" must be text, not null'),
        ({"conversations": ["why"]}, r"conversations\[0\] must be an object, not text"),
    ],
)
def test_a_wrong_record_is_told_with_its_place(raw, words):
    with pytest.raises(ConfigError, match=f"^train.jsonl line 17: .*{words}"):
        read(raw)


def test_a_named_format_is_not_guessed_again():
    with pytest.raises(ConfigError, match='line 17: no "text"'):
        read(SAME_CONVERSATION[DataFormat.ALPACA], DataFormat.TEXT)


def test_ten_problems_are_told_and_the_rest_counted():
    told = first_problems([f"problem {i}" for i in range(2012)], where="train.jsonl")
    assert told[9:] == ["problem 9", "train.jsonl: 2,002 more problems like these"]
