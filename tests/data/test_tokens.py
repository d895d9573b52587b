"""Labels are the answers and nothing else, with every tokenizer and template."""

import pytest
from datasets import Dataset

from goat_ds.data.formats import Dropped, DropReason, Record
from goat_ds.data.tokens import IGNORE, content_digest, prompt_ids, stop_ids, tokenise
from goat_ds.errors import ConfigError

from .conftest import CHATML, LLAMA2, decode

USER, ANSWER = {"role": "user", "content": "why is the cat"}, {"role": "assistant", "content": "the mat is true"}
SECOND = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "two dogs\nsat"}]
MULTI_TURN = [USER, ANSWER, *SECOND]
TEMPLATES = {"plain": None, "chatml": CHATML, "llama2": LLAMA2}
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: the last answer alone is given empty thoughts, and earlier thoughts are left out.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'].split('</think>')[-1].strip() + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows(records, tokenizer, path, max_length=512):
    return tokenise(records, tokenizer, max_length=max_length, arrow_file=path / "tokens.arrow").dataset


def row(messages, tokenizer, path):
    return rows([Record("a", messages, "")], tokenizer, path)[0]


def decoded_labels(row, tokenizer):
    """The labelled stretches as text."""
    stretches, previous = [], None
    for place, label in enumerate(row["labels"]):
        if label != IGNORE:
            if place - 1 != previous:
                stretches.append([])
            stretches[-1].append(label)
            previous = place
    return [
        decode(ids, tokenizer).replace(" </s>", "</s>").replace(" <|im_end|>", "<|im_end|>").strip()
        for ids in stretches
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_decode_to_exactly_the_answers_and_what_closes_them(tokenizer, tmp_path, template):
    tokenizer.chat_template = TEMPLATES[template]
    closing = "<|im_end|>" if template == "chatml" else "</s>"
    found = row(MULTI_TURN, tokenizer, tmp_path)
    assert decoded_labels(found, tokenizer) == [f"the mat is true{closing}", f"two dogs\nsat{closing}"]
    assert found["num_labels"] == sum(label != IGNORE for label in found["labels"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("num_messages", [1, 3])
def test_a_prompt_is_token_for_token_how_its_training_sequence_begins(tokenizer, tmp_path, template, num_messages):
    tokenizer.chat_template = TEMPLATES[template]
    found = row(MULTI_TURN, tokenizer, tmp_path)
    prompt = prompt_ids(MULTI_TURN[:num_messages], tokenizer)
    assert found["input_ids"][: len(prompt)] == prompt
    # …and the next token is the first of the answer.
    assert found["labels"][len(prompt) - 1] == IGNORE != found["labels"][len(prompt)]


@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_a_prompt_is_what_the_chat_template_gives(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    expected = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt_ids("why is the cat", tokenizer) == expected


def test_every_label_is_the_token_at_its_place_and_the_first_has_none(tokenizer, tmp_path):
    for found in rows([Record("a", MULTI_TURN, ""), Record("b", [], "the cat sat")], tokenizer, tmp_path):
        pairs = zip(found["labels"], found["input_ids"], strict=True)
        assert all(label in (IGNORE, token) for label, token in pairs)
        assert found["labels"][0] == IGNORE
        assert found["num_tokens"] == len(found["input_ids"])


def test_text_is_tokenised_as_the_tokenizer_does_it_and_closed(tokenizer, tmp_path):
    found = rows([Record("a", [], "the cat sat")], tokenizer, tmp_path)[0]
    assert found["input_ids"] == [*tokenizer("the cat sat")["input_ids"], tokenizer.eos_token_id]
    assert found["labels"][1:] == found["input_ids"][1:]


def test_bos_is_there_once_if_the_tokenizer_puts_it(sentencepiece_folder, tmp_path):
    from transformers import LlamaTokenizer

    for template, adds_bos, count in ((None, True, 1), (None, False, 0), (LLAMA2, True, 1), (LLAMA2, False, 1)):
        tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, add_bos_token=adds_bos)
        tokenizer.chat_template = template
        assert row([USER, ANSWER], tokenizer, tmp_path)["input_ids"].count(tokenizer.bos_token_id) == count


def test_an_answer_goes_on_from_the_prompt_without_a_space_of_its_own(tokenizer, tmp_path):
    text = decode(row([USER, ANSWER], tokenizer, tmp_path)["input_ids"], tokenizer)
    assert "### Response:\nthe mat" in text


def test_the_alpaca_prompt_has_a_place_for_the_input(bpe, tmp_path):
    with_input = [{**USER, "input": "two dogs"}, ANSWER]
    text = bpe.decode(row(with_input, bpe, tmp_path)["input_ids"])
    assert "provides further context. Write a response" in text
    assert text.endswith(
        "### Instruction:\nwhy is the cat\n\n### Input:\ntwo dogs\n\n### Response:\nthe mat is true</s>"
    )
    bpe.chat_template = CHATML
    assert "user\nwhy is the cat\n\ntwo dogs<|im_end|>" in bpe.decode(row(with_input, bpe, tmp_path)["input_ids"])


def test_a_system_message_stands_in_place_of_alpacas_first_sentence(bpe, tmp_path):
    messages = [{"role": "system", "content": "be true"}, {**USER}, {"role": "tool", "content": "a dog"}, ANSWER]
    text = bpe.decode(row(messages, bpe, tmp_path)["input_ids"])
    assert text.startswith("be true\n\n### Instruction:\nwhy is the cat\n\n### Tool:\na dog\n\n### Response:\n")


def test_the_marks_of_a_template_are_believed_and_the_closing_token_added(tokenizer, tmp_path):
    tokenizer.chat_template = MARKED
    found = row(MULTI_TURN, tokenizer, tmp_path)
    assert decoded_labels(found, tokenizer) == ["the mat is true<|im_end|>", "two dogs\nsat<|im_end|>"]


def test_what_the_prompt_gives_is_not_learned_even_if_a_template_marks_it(bpe, tmp_path):
    bpe.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n<think>' }}"
        "{% endgeneration %}{% generation %}{{ '</think>' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    found = row(MULTI_TURN, bpe, tmp_path)
    assert decoded_labels(found, bpe) == ["</think>the mat is true<|im_end|>", "</think>two dogs\nsat<|im_end|>"]
    prompt = prompt_ids(MULTI_TURN[:3], bpe)
    assert found["input_ids"][: len(prompt)] == prompt
    assert stop_ids(bpe) == sorted([bpe.eos_token_id, bpe.convert_tokens_to_ids("<|im_end|>")])


def test_thoughts_that_a_template_adds_or_leaves_out_do_not_move_the_labels(bpe, tmp_path):
    bpe.chat_template = THINKING
    thinking = [USER, {"role": "assistant", "content": "<think>two</think>the mat"}, *SECOND]
    texts = decoded_labels(row(thinking, bpe, tmp_path), bpe)
    assert texts == ["the mat<|im_end|>", "<think>\n\n</think>\n\ntwo dogs\nsat<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("assistant", "assistant: "), "renders the prompt for an answer differently"),
        (CHATML.replace("m['content']", "m['content'] | upper"), 'leaves out or changes a message of "user"'),
        (CHATML.replace("<|im_end|>", ""), "does not close an answer with a special token"),
        (MARKED.replace("<|im_end|>", ""), "marks an answer with {% generation %} that no special token closes"),
        ("{{ raise_exception('no cats') }}", "refuses this conversation: no cats"),
    ],
)
def test_a_template_that_does_not_show_its_answers_is_refused(bpe, tmp_path, template, words):
    bpe.chat_template = template
    with pytest.raises(ConfigError, match=f"^train.jsonl line 3: the tokenizer's chat template .*{words}"):
        rows([Record("train.jsonl line 3", [USER, ANSWER], "")], bpe, tmp_path)


def test_a_template_that_leaves_out_tool_messages_is_refused(bpe, tmp_path):
    bpe.chat_template = CHATML.replace("{{ '<|im_start|>' + m", "{{ '' if m['role'] == 'tool' else '<|im_start|>' + m")
    with pytest.raises(ConfigError, match='leaves out or changes a message of "tool"'):
        row([USER, {"role": "tool", "content": "a dog"}, ANSWER], bpe, tmp_path)


def test_the_tokens_that_end_an_answer_are_eos_and_the_end_of_the_turn(tokenizer):
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = CHATML
    assert stop_ids(tokenizer) == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])


def test_truncation_keeps_the_head_and_the_report_counts_everything(bpe, tmp_path):
    short, long = Record("a", [], "the cat"), Record("b", [], "the cat sat on " * 50)
    late = Record("c", [{**USER, "content": "the cat " * 50}, ANSWER], "")
    records = [short, long, late, Dropped("d", DropReason.EMPTY_ANSWER)]
    dataset, report = tokenise(records, bpe, max_length=30, arrow_file=tmp_path / "tokens.arrow")
    assert dataset["origin"][:] == ["a", "b"]
    assert dataset[1]["input_ids"] == bpe(long.text)["input_ids"][:30]
    assert report.num_read == 4 and report.num_kept == 2 and report.num_truncated == 1
    assert report.dropped == {"no label token left after truncation": 1, "empty answer": 1}
    assert report.num_tokens == sum(dataset["num_tokens"]) and report.num_label_tokens == sum(dataset["num_labels"])
    assert str(report).splitlines()[0] == "4 records read, 2 kept, 1 of them truncated"


def test_no_label_left_anywhere_names_the_way_out(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"1 with no label token left after truncation; raise --max_length \(8\)"):
        rows([Record("a", [USER, ANSWER], "")], bpe, tmp_path, max_length=8)


def test_nothing_but_empty_answers_is_refused(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"no record is left to train on: 1 with empty answer$"):
        rows([Dropped("a", DropReason.EMPTY_ANSWER)], bpe, tmp_path)


def test_a_tokenizer_without_eos_is_refused(bpe, tmp_path):
    bpe.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no EOS token: set eos_token"):
        rows([Record("a", [], "the cat")], bpe, tmp_path)


def test_thousands_of_records_keep_their_order(bpe, tmp_path):
    records = [Record(str(i), [], "the cat " * (i % 7 + 1)) for i in range(2500)]
    dataset = rows(records, bpe, tmp_path)
    assert dataset["origin"][:] == [str(i) for i in range(2500)]
    assert len(dataset[2499]["input_ids"]) == len(bpe(records[2499].text)["input_ids"]) + 1


def test_the_digest_of_data_knows_ids_labels_and_where_a_record_ends():
    def digest(input_ids, labels):
        return content_digest(Dataset.from_dict({"input_ids": input_ids, "labels": labels}))

    records = [[5, 6, 7], [8, 9]], [[IGNORE, 6, 7], [IGNORE, 9]]
    assert digest(*records) == digest(*records)
    others = [
        ([[5, 6, 4], [8, 9]], records[1]),
        (records[0], [[IGNORE, IGNORE, 7], [IGNORE, 9]]),
        ([[5, 6], [7, 8, 9]], [[IGNORE, 6], [7, IGNORE, 9]]),
        (records[0][::-1], records[1][::-1]),
    ]
    assert len({digest(*records), *(digest(*other) for other in others)}) == 1 + len(others)
