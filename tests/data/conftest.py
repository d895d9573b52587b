"""Tokenizers of every kind, made on the spot, and ways to write data files."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "true",
    "false",
    "answer",
    "is",
    "what",
    "why",
    "two",
    "Response",
]
CORPUS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 12)) for i in range(400)]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a ``tokenizer.model``."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


def byte_bpe() -> PreTrainedTokenizerFast:
    """A tiny tokenizer of GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@pytest.fixture(params=["byte_bpe", "fast_sentencepiece", "slow_sentencepiece", "slow_legacy_sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_folder: Path) -> PreTrainedTokenizerBase:
    """Each kind of tokenizer, without a chat template."""
    model = str(sentencepiece_folder / "tokenizer.model")
    makers: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
        "byte_bpe": byte_bpe,
        "fast_sentencepiece": lambda: LlamaTokenizer.from_pretrained(sentencepiece_folder, add_bos_token=True),
        "slow_sentencepiece": lambda: SentencePieceBackend(vocab_file=model, legacy=False, **SPECIAL),
        "slow_legacy_sentencepiece": lambda: SentencePieceBackend(vocab_file=model, legacy=True, **SPECIAL),
    }
    return with_chat_tokens(makers[request.param]())


@pytest.fixture
def bpe() -> PreTrainedTokenizerBase:
    """One tokenizer, where the kind does not matter."""
    return with_chat_tokens(byte_bpe())


def with_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return ``tokenizer`` the special tokens of ChatML, but no template."""
    tokenizer.add_special_tokens({"extra_special_tokens": CHAT_TOKENS})
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes records to a file and returns its path."""

    def write(records: Iterable[Any], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode byte tokens as well, which transformers' slow SentencePiece class writes out as ``<0x0A>``."""
    text = tokenizer.decode(ids)
    return re.sub(r"(<0x[0-9A-F]{2}>)+", lambda bytes_: bytes.fromhex(re.sub("[<>]|0x", "", bytes_[0])).decode(), text)
