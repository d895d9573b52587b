"""The README.md of an exported folder: what it is, how to load it, and what it was trained with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from goat_ds.export.checkpoint import Adapter
from goat_ds.export.report import ExportReport, hub_name

METHOD = (
    "GOAT ([Make LoRA Great Again](https://arxiv.org/abs/2502.16894)) routes every token through a mixture of low-rank "
    "experts, each of which started from its own segment of the weights' singular spectrum."
)

ADAPTER_USE = """\
A [PEFT](https://github.com/huggingface/peft) adapter; PEFT knows the method once `goat_ds` is imported:

```python
import goat_ds
from peft import PeftModel
from transformers import {names}

{load}
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


def adapter_card(adapter: Adapter, report: ExportReport, *, title: str) -> str:
    """Write the card of an adapter folder."""
    use = ADAPTER_USE.format(load=_loading(adapter), names=_names_to_import(adapter), folder=title)
    return _card(adapter, report, title=title, library="peft", use=use)


def _names_to_import(adapter: Adapter) -> str:
    return "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if adapter.quantization else "")


def _loading(adapter: Adapter) -> str:
    """Write the lines that load the base as it was in training."""
    base, trained = adapter.config.base_model_name_or_path or "base", adapter.quantization
    if trained is None:
        return f"base = AutoModelForCausalLM.from_pretrained({base!r})"
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": trained.packing.quant_type,
        "bnb_4bit_use_double_quant": trained.packing.double_quant,
        "bnb_4bit_compute_dtype": trained.compute_dtype,
    }
    if trained.kept:
        settings["llm_int8_skip_modules"] = ["lm_head", *trained.kept]
    lines = ["quantization = BitsAndBytesConfig(", *(f"    {name}={value!r}," for name, value in settings.items()), ")"]
    lines.append(
        f"base = AutoModelForCausalLM.from_pretrained(\n    {base!r}, dtype={trained.dtype!r}, "
        "quantization_config=quantization\n)"
    )
    return "\n".join(lines)


def exact_card(adapter: Adapter, report: ExportReport, *, title: str) -> str:
    """Write the card of an exact folder."""
    return _card(adapter, report, title=title, library="transformers", use=EXACT_USE.format(folder=title))


def _card(adapter: Adapter, report: ExportReport, *, title: str, library: str, use: str) -> str:
    data = ModelCardData(
        base_model=hub_name(adapter.config.base_model_name_or_path or ""),
        library_name=library,
        tags=["goat", "lora", "mixture-of-experts"],
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(adapter, report))
    table = f"## Training\n\n| | |\n|---|---|\n{rows}"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{METHOD}\n\n{use}\n{table}\n"


def _facts(adapter: Adapter, report: ExportReport) -> Iterator[tuple[str, Any]]:
    config = adapter.config
    yield "base", report.base
    if adapter.quantization:
        yield (
            "base in training",
            f"4-bit ({adapter.quantization.packing}), computed in {adapter.quantization.compute_dtype}",
        )
    if report.merge_base:
        yield "merge_base", f"{report.merge_base}: {report.values}"
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
