"""The README.md of an exported folder: what it is, how to load it, and what it was trained with."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from goat_ds.export.adapter_file import Adapter
from goat_ds.export.dequantize import MergeBase
from goat_ds.export.merge_report import ExportReport, MergeReport, hub_name
from goat_ds.tuner.base_quantization import BaseQuantization

METHOD = (
    "GOAT ([Make LoRA Great Again](https://arxiv.org/abs/2502.16894)) routes every token through a mixture of low-rank "
    "experts, each of which started from its own segment of the weights' singular spectrum."
)
WHOLE = (
    "A mixture of whole copies of every adapted weight, which GOAT "
    "([Make LoRA Great Again](https://arxiv.org/abs/2502.16894)) approximates by low-rank experts: a router mixes the "
    "copies for every token, and each is stored as its difference from the weight of the base."
)
DENSE = (
    "The routers left before training ended, and the experts, fitted to what they gave on average, were trained on as "
    "one dense adapter: what they add to a layer is the same for every token."
)
OPTIONS = (
    "routing", "top_p", "max_threshold", "shared_experts", "temperature", "expert_dropout", "router_noise", "shared_A",
    "rho_warmup_steps",
)  # fmt: skip
"""Settings that are shown where they are not the default."""

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
The whole model: base weights and experts, with the modelling code beside them (`modeling_goat.py`, which imports \
torch and transformers 5); a reader without `trust_remote_code=True` finds weights missing.{why}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""

DENSE_USE = """\
Dense weights of the base's own architecture, {origin}; what merging cost is below and in `merge_report.json`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```

{cost}"""

LORA_USE = """\
A plain LoRA adapter, {origin}; what merging cost is below and in `merge_report.json`.

```python
from peft import PeftModel
from transformers import {names}

{load}
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```

{cost}"""


def dense_card(adapter: Adapter, report: MergeReport, *, title: str) -> str:
    """Write the card of a dense folder."""
    use = DENSE_USE.format(folder=title, origin=_origin(adapter), cost=_cost(report))
    return _card(adapter, report, title=title, library="transformers", use=use)


def lora_card(adapter: Adapter, report: MergeReport, *, base: str, title: str) -> str:
    """Write the card of a LoRA folder.

    Args:
        adapter: What was trained.
        report: Which weights of the base it was merged for, and what that cost.
        base: Folder or hub name of the base.
        title: Of the card.
    """
    packed = adapter.quantization if report.merge_base is MergeBase.DEQUANT_W4 else None
    use = LORA_USE.format(
        folder=title,
        load=_loading(base, packed),
        names=_names_to_import(packed),
        origin=_origin(adapter),
        cost=_cost(report),
    )
    return _card(adapter, report, title=title, library="peft", use=use)


def _origin(adapter: Adapter) -> str:
    if adapter.is_routed:
        return "merged from routed experts as near as dense weights come"
    return "merged from experts that a dense finish had freed of their routers"


def _cost(report: MergeReport) -> str:
    lines = "\n".join(report.table())
    return f"```text\n{lines}\n```\n"


def adapter_card(adapter: Adapter, report: ExportReport, *, title: str) -> str:
    """Write the card of an adapter folder."""
    base = adapter.config.base_model_name_or_path or "base"
    packed = adapter.quantization
    use = ADAPTER_USE.format(load=_loading(base, packed), names=_names_to_import(packed), folder=title)
    return _card(adapter, report, title=title, library="peft", use=use)


def _names_to_import(trained: BaseQuantization | None) -> str:
    return "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if trained else "")


def _loading(base: str, trained: BaseQuantization | None) -> str:
    """Write the lines that load the base as it was in training."""
    if trained is None:
        return f"base = AutoModelForCausalLM.from_pretrained({base!r})"
    settings = trained.bitsandbytes_settings()
    lines = ["quantization = BitsAndBytesConfig(", *(f"    {name}={value!r}," for name, value in settings.items()), ")"]
    lines.append(
        f"base = AutoModelForCausalLM.from_pretrained(\n    {base!r}, dtype={trained.dtype!r}, "
        "quantization_config=quantization\n)"
    )
    return "\n".join(lines)


def exact_card(adapter: Adapter, report: ExportReport, *, title: str) -> str:
    """Write the card of an exact folder."""
    why = " Experts depend on the token, so no dense weights equal this model." if adapter.is_routed else ""
    return _card(adapter, report, title=title, library="transformers", use=EXACT_USE.format(folder=title, why=why))


def _card(adapter: Adapter, report: ExportReport, *, title: str, library: str, use: str) -> str:
    data = ModelCardData(
        base_model=hub_name(adapter.config.base_model_name_or_path or ""),
        library_name=library,
        tags=["goat", *([] if adapter.config.full_rank else ["lora"]), "mixture-of-experts"],
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(adapter, report))
    table = f"## Training\n\n| | |\n|---|---|\n{rows}"
    method = METHOD if adapter.config.routed else f"{METHOD} {DENSE}"
    if adapter.config.full_rank:
        method = WHOLE
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{method}\n\n{use}\n{table}\n"


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
    of_scale = "eta" if config.scaling == "theory" else "lora_alpha"
    names = ["r", "num_experts", "top_k", "routed", "init", "rho", "scaling", of_scale, "adaptive_scale", "residual"]
    if config.full_rank:
        names = ["full_rank", "num_experts", "top_k"]
    for name in (*names, "balance_coef", "dropout"):
        yield name, getattr(config, name)
    defaults = {field.name: field.default for field in fields(config)}
    yield from ((name, getattr(config, name)) for name in OPTIONS if getattr(config, name) != defaults[name])
    if adapter.step is not None:
        yield "step", adapter.step
        yield from _metrics(adapter.path.parent.parent / "metrics.jsonl", adapter.step)


def _metrics(path: Path, step: int) -> Iterator[tuple[str, Any]]:
    """Return what the run logged last before the checkpoint, if its log is still beside it."""
    if not path.is_file():
        return
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    logged = [record for record in records if record.get("step", step + 1) <= step and "loss" in record]
    if logged:
        yield f"loss at step {logged[-1]['step']}", f"{logged[-1]['loss']:.4f}"
