"""Tiny random bases of several architectures, each with a trained-looking adapter on disk."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from goat_ds import GoatConfig
from tests.models import CAUSAL_LMS, LLAMA_LIKE

ARCHITECTURES = CAUSAL_LMS | {
    "llama_tied": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=2),
    "gpt_neox": GPTNeoXConfig(**LLAMA_LIKE),
}
TOKENS = torch.tensor([[1, 5, 9, 33, 12, 7], [1, 8, 60, 3, 3, 21]])


@dataclass(frozen=True)
class Trained:
    """A base folder, its adapter folder, and the routed model in memory."""

    base: Path
    adapter: Path
    model: peft.PeftModel

    def logits(self) -> torch.Tensor:
        """What the routed model in memory says about ``TOKENS``."""
        with torch.no_grad():
            return self.model(input_ids=TOKENS).logits


def write_base(folder: Path, config: PreTrainedConfig, **save: Any) -> PreTrainedModel:
    """Save a random base with tokenizer; norms and biases are random too, so that none can be lost unseen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return model


def train(folder: Path, architecture: str, **settings: Any) -> Trained:
    """Write a base and an adapter that has moved away from its start."""
    base = folder / "base"
    write_base(base, ARCHITECTURES[architecture])
    return adapt(base, folder / "adapter", **settings)


def adapt(base: Path, adapter: Path, **settings: Any) -> Trained:
    """Put random experts on a base and save them."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = GoatConfig(**({"r": 8, "num_experts": 4, "top_k": 2, "eta": 0.2, "task_type": "CAUSAL_LM"} | settings))
    routed = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in routed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    routed.save_pretrained(adapter)
    return Trained(base=base, adapter=adapter, model=routed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads, and far slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """A LLaMA base with an adapter on all linear layers."""
    return train(tmp_path, "llama")
