"""Which architectures can be trained on rows of several documents, asked of configs of real size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, Gemma2Config, LlamaConfig

from goat_ds.base.inspect import inspect
from goat_ds.base.packing_probe import row_problem
from tests.models import CAUSAL_LMS

KEEP_APART = [
    "Llama",
    "Mistral",
    "Mixtral",
    "Qwen2",
    "Qwen3",
    "Qwen3Moe",
    "Gemma2",
    "Gemma3Text",
    "Phi3",
    "GPT2",
    "GPTNeoX",
    "GPTJ",
    "Olmo2",
    "Granite",
    "Starcoder2",
    "Cohere",
    "StableLm",
]
EAGER_ONLY = {"Gemma2", "GPTJ"}
MIX: dict[str, dict[str, Any]] = {
    "OPT": {},
    "Bloom": {},
    "Falcon": {"alibi": True},
    "Mamba": {},
    "Qwen3Next": {},
    "RecurrentGemma": {},
    "Lfm2": {"full_attn_idxs": [2, 5, 9]},
}


def saved(folder: Path, name: str, **fields: Any) -> str:
    getattr(transformers, f"{name}Config")(**fields).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", KEEP_APART)
def test_an_architecture_that_keeps_documents_apart_is_let_through(tmp_path: Path, name: str) -> None:
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    assert row_problem(inspect(saved(tmp_path, name)), attention=attention) is None


@pytest.mark.parametrize("name", MIX)
def test_an_architecture_that_mixes_documents_is_refused(tmp_path: Path, name: str) -> None:
    problem = row_problem(inspect(saved(tmp_path, name, **MIX[name])))
    assert problem is not None
    assert problem.startswith(f"model ({tmp_path}): the ")
    assert "does not keep the documents of a packed row apart" in problem


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_a_config_that_is_small_already_is_let_through(tmp_path: Path, name: str) -> None:
    CAUSAL_LMS[name].save_pretrained(tmp_path)
    assert row_problem(inspect(str(tmp_path))) is None


def test_tied_embeddings_grouped_heads_and_long_rope_survive_the_shrinking(tmp_path: Path) -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    fields = {"rope_parameters": factors, "num_key_value_heads": 8, "tie_word_embeddings": True}
    assert row_problem(inspect(saved(tmp_path, "Phi3", max_position_embeddings=131072, **fields))) is None


def test_a_model_that_reads_both_ways_is_refused_until_it_is_a_decoder(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    problem = row_problem(inspect(str(tmp_path)))
    assert problem is not None
    assert "bert sees tokens that come later, so it would be trained on answers it can read" in problem
    BertConfig(is_decoder=True).save_pretrained(tmp_path)
    assert "sees tokens that come later" not in (row_problem(inspect(str(tmp_path))) or "")


def test_an_attention_code_that_the_architecture_lacks_is_named_with_the_way_out(tmp_path: Path) -> None:
    Gemma2Config().save_pretrained(tmp_path)
    assert row_problem(inspect(str(tmp_path))) == (
        f"model ({tmp_path}): gemma2 has no sdpa attention in transformers; use attn eager"
    )


def test_an_architecture_that_cannot_be_tried_is_refused(tmp_path: Path) -> None:
    LlamaConfig(hidden_act="no_such_activation").save_pretrained(tmp_path)
    problem = row_problem(inspect(str(tmp_path)))
    assert problem is not None
    assert "could not be checked on a tiny copy (KeyError: " in problem
    assert problem.endswith("it is not supported")


def test_the_probe_leaves_the_random_stream_as_it_was(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    row_problem(inspect(str(tmp_path)))
    assert torch.equal(torch.get_rng_state(), before)
