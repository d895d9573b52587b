"""The README.md of an exported folder: what it is, how to load it, and what it was trained with."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from goat_ds.export.checkpoint import Adapter

METHOD = (
    "GOAT ([Make LoRA Great Again](https://arxiv.org/abs/2502.16894)) routes every token through a mixture of low-rank "
    "experts, each of which started from its own segment of the weights' singular spectrum."
)

ADAPTER_USE = """\
A [PEFT](https://github.com/huggingface/peft) adapter; PEFT knows the method once `goat_ds` is imported:

```python
import goat_ds
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""

EXACT_USE = """\
The whole model: base weights, experts and router, with the modelling code beside them (`modeling_goat.py`, which \
imports torch and transformers 5). Experts depend on the token, so no dense weights equal this model; a reader without \
`trust_remote_code=True` finds weights missing.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""


def adapter_card(adapter: Adapter, *, title: str) -> str:
    """Write the card of an adapter folder."""
    base = adapter.config.base_model_name_or_path or "base"
    return _card(adapter, title=title, library="peft", use=ADAPTER_USE.format(base=base, folder=title))


def exact_card(adapter: Adapter, *, title: str) -> str:
    """Write the card of an exact folder."""
    return _card(adapter, title=title, library="transformers", use=EXACT_USE.format(folder=title))


def _card(adapter: Adapter, *, title: str, library: str, use: str) -> str:
    data = ModelCardData(
        base_model=_hub_name(adapter), library_name=library, tags=["goat", "lora", "mixture-of-experts"]
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(adapter))
    table = f"## Training\n\n| | |\n|---|---|\n{rows}"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{METHOD}\n\n{use}\n{table}\n"


def _hub_name(adapter: Adapter) -> str | None:
    """Give the base as the hub knows it; a path on the disk of the training machine means nothing there."""
    name = adapter.config.base_model_name_or_path or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _facts(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    config = adapter.config
    yield "base", _hub_name(adapter) or Path(config.base_model_name_or_path or "?").name
    yield "adapted layers", len(adapter.layers)
    if adapter.whole:
        yield "trained whole", ", ".join(adapter.whole)
    for name in ("r", "num_experts", "top_k", "init", "rho", "scaling"):
        yield name, getattr(config, name)
    if config.scaling == "theory":
        yield "eta", config.eta
    else:
        yield "lora_alpha", config.lora_alpha
    for name in ("adaptive_scale", "residual", "balance_coef", "dropout"):
        yield name, getattr(config, name)
    if adapter.step is not None:
        yield "step", adapter.step
        yield from _metrics(adapter.path.parent.parent / "metrics.jsonl", adapter.step)


def _metrics(path: Path, step: int) -> Iterator[tuple[str, Any]]:
    """Give what the run logged last before the checkpoint, if its log is still beside it."""
    if not path.is_file():
        return
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    logged = [record for record in records if record.get("step", step + 1) <= step and "loss" in record]
    if logged:
        yield f"loss at step {logged[-1]['step']}", f"{logged[-1]['loss']:.4f}"
