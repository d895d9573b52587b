"""Tiny random bases of several architectures, each with a trained-looking adapter on disk."""

import copy
import json
from collections.abc import Callable, Iterator
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
    BitsAndBytesConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from goat_ds import GoatConfig
from goat_ds.tuner.base_quantization import layers_to_quantize
from goat_ds.tuner.fingerprint import BaseFingerprint
from goat_ds.tuner.fit_sums import dense_goat_config
from goat_ds.tuner.layer import GoatLayer
from goat_ds.tuner.model import named_experts
from goat_ds.tuner.quantized import Packing, QuantizedLinear, pack
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


def write_base(folder: Path, config: PreTrainedConfig, *, seed: int = 0, **save: Any) -> PreTrainedModel:
    """Save a random base with tokenizer; norms and biases are random too, so that none can be lost unseen."""
    torch.manual_seed(seed)
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


def adapt(
    base: Path,
    adapter: Path,
    *,
    load: dict[str, Any] | None = None,
    finish: Callable[[peft.PeftModel], None] | None = None,
    **settings: Any,
) -> Trained:
    """Put random experts on a base, loaded as ``load`` says, and save them as ``finish`` leaves them."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, **(load or {}))
    config = GoatConfig(**({"r": 8, "num_experts": 4, "top_k": 2, "eta": 0.2, "task_type": "CAUSAL_LM"} | settings))
    routed = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for parameter in routed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if finish:
        finish(routed)
    routed.save_pretrained(adapter)
    return Trained(base=base, adapter=adapter, model=routed)


def needing_code(base: Path, ran: Path) -> Path:
    """Make a base need code of its author, which leaves a file where it runs."""
    config = json.loads((base / "config.json").read_text())
    named = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "stranger", "auto_map": named}))
    (base / "strange.py").write_text(f"open({str(ran)!r}, 'w')\n")
    return base


def become_dense(routed: peft.PeftModel) -> None:
    """Leave an adapter as a dense finish does: without routers, and saying so."""
    configs: dict[str, Any] = routed.peft_config
    configs["default"] = dense_goat_config(configs["default"])
    for item in named_experts(routed, "default"):
        item.experts.become_dense(configs["default"])


def in_4bit(
    *, dtype: torch.dtype = torch.float32, compute: str = "float32", kept: tuple[str, ...] = (), **packing: Any
) -> dict[str, Any]:
    """Return what makes ``adapt`` train as launch/train.py does with load_in_4bit: in ``dtype``, on packed layers."""

    def finish(routed: peft.PeftModel) -> None:
        base: Any = routed.get_base_model()
        for path, layer in layers_to_quantize(base, kept=kept):
            weight_OI = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            packed = QuantizedLinear(
                pack(weight_OI, Packing(**packing)),
                packing=Packing(**packing),
                shape=tuple(weight_OI.shape),
                bias=layer.bias,
                dtype=dtype,
                compute_dtype=getattr(torch, compute),
                weight_dtype=dtype,
            )
            base.set_submodule(path + ".base_layer" * isinstance(base.get_submodule(path), GoatLayer), packed)
        tuner: Any = routed.base_model
        known = tuner.peft_config["default"].base_fingerprint
        tuner.record_base("default", fingerprint=known and BaseFingerprint(**known))

    return {"load": {"dtype": dtype}, "finish": finish}


def by_bitsandbytes(dtype: torch.dtype = torch.float32, **quantization: Any) -> dict[str, Any]:
    """Return what makes ``adapt`` train on bitsandbytes' own layers, with experts in the model's dtype."""

    def finish(routed: peft.PeftModel) -> None:
        for name, parameter in routed.named_parameters():
            if "goat_experts" in name:
                parameter.data = parameter.data.to(dtype)

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype} | quantization
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return {"load": {"dtype": dtype, "quantization_config": config}, "finish": finish}


def store_4bit(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **quantization: Any) -> Path:
    """Write a base as bitsandbytes stores it."""
    load = by_bitsandbytes(dtype, **quantization)["load"]
    AutoModelForCausalLM.from_pretrained(base, **load).save_pretrained(folder)
    return folder


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
