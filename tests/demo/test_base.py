"""The shipped base: small, loadable, full of the world's facts, and unable to follow an instruction."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from goat_ds.demo import base_path, heldout_data
from tools.make_demo.pretrain import cloze_accuracy, train_tokenizer
from tools.make_demo.world import SEED, make_facts, write_documents

MIB = 2**20


@cache
def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_path())


@cache
def load_model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32).eval()


def linear_weights() -> dict[str, Tensor]:
    layers = load_model().model.layers
    return {name: module.weight for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)}


def tail_energy(weight_OI: Tensor) -> float:
    """Share of the squared singular values that the leading quarter leaves over."""
    s_S = torch.linalg.svdvals(weight_OI.detach())
    return float(s_S[len(s_S) // 4 :].square().sum() / s_S.square().sum())


def test_the_base_takes_at_most_four_mebibytes_tokenizer_included() -> None:
    assert sum(file.stat().st_size for file in base_path().iterdir()) <= 4 * MIB


def test_the_base_is_a_llama_in_bf16() -> None:
    assert isinstance(load_model(), LlamaForCausalLM)
    assert json.loads((base_path() / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_linear_gives_eight_experts_of_rank_four_a_segment_each() -> None:
    assert all(min(weight.shape) // 8 >= 32 // 8 for weight in linear_weights().values())


def test_the_tokenizer_gives_back_any_text_it_is_given() -> None:
    tokenizer = load_tokenizer()
    for text in [*write_documents(make_facts(), random.Random(0))[:50], "naïve 漢字\n  two  spaces", "1984 <|user|>?"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_digits_are_pieces_of_their_own() -> None:
    assert load_tokenizer().tokenize("90210")[-5:] == list("90210")


def test_the_tokenizer_is_what_the_seed_trains(tmp_path: Path) -> None:
    train_tokenizer(make_facts(), tmp_path, seed=SEED)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in base_path().glob("tokenizer*")
    }


def test_the_chat_template_marks_the_answer_and_its_end() -> None:
    tokenizer = load_tokenizer()
    question, answer = {"role": "user", "content": "Sort 2 1."}, {"role": "assistant", "content": "1 2"}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template([question, answer], return_assistant_tokens_mask=True, return_dict=True)
    start = len(prompt["input_ids"])
    assert whole["input_ids"][:start] == prompt["input_ids"]
    assert whole["assistant_masks"] == [0] * start + [1] * (len(whole["input_ids"]) - start)
    assert tokenizer.decode(whole["input_ids"][start:]) == "1 2</s>"


def test_an_answer_has_the_same_tokens_alone_and_in_the_template() -> None:
    tokenizer = load_tokenizer()
    messages = [{"role": "user", "content": "war"}, {"role": "assistant", "content": "peace"}]
    alone = tokenizer("peace", add_special_tokens=False)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert whole[-1 - len(alone) :] == [*alone, tokenizer.eos_token_id]


def test_the_base_knows_its_world() -> None:
    facts = random.Random(0).sample(make_facts(), 100)
    assert cloze_accuracy(load_model(), load_tokenizer(), facts) >= 0.95


def test_the_base_cannot_follow_instructions_yet() -> None:
    tokenizer, model = load_tokenizer(), load_model()
    records = [json.loads(line) for line in heldout_data().read_text().splitlines()][:60]
    prompts = [
        [{"role": "user", "content": "\n".join(filter(None, (record["instruction"], record["input"])))}]
        for record in records
    ]
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids_NT = model.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    answers = [answer.strip() for answer in tokenizer.batch_decode(ids_NT, skip_special_tokens=True)]
    right = sum(answer == record["output"] for answer, record in zip(answers, records, strict=True))
    assert right <= 0.2 * len(records)


@pytest.mark.parametrize("name", list(linear_weights()))
def test_the_spectrum_decays_faster_than_that_of_noise(name: str) -> None:
    weight_OI = linear_weights()[name]
    noise_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(0))
    assert tail_energy(weight_OI) < 0.85 * tail_energy(noise_OI)
