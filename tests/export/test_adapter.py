"""The adapter folder stands alone, and an adapter that is not whole does not leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from goat_ds.data.sample import SAMPLE_NAME
from goat_ds.errors import ConfigError, ExportError
from goat_ds.export import export_adapter, export_dense, export_exact, export_lora, find_adapter, read_adapter
from goat_ds.manifest import write_manifest
from tests.export.conftest import TOKENS, Trained, become_dense, train

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def change_weights(trained: Trained, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(trained.adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, trained.adapter / WEIGHTS)


def change_config(trained: Trained, **values: Any) -> None:
    path = trained.adapter / CONFIG
    merged = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in merged.items() if value is not ...}))


def test_the_exported_adapter_gives_the_trained_logits_bit_for_bit(tmp_path: Path, trained: Trained) -> None:
    export_adapter(trained.adapter, output=tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(trained.base)
    routed = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(routed(input_ids=TOKENS).logits, trained.logits())


def test_an_adapter_that_is_not_as_its_checkpoint_was_written_does_not_leave(tmp_path: Path, trained: Trained) -> None:
    checkpoint = trained.adapter.parent
    write_manifest(checkpoint)
    export_adapter(trained.adapter, output=tmp_path / "whole")
    content = bytearray((trained.adapter / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (trained.adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(ExportError, match=rf"{WEIGHTS} is damaged: its SHA-256 is not the one in manifest.json"):
        export_adapter(trained.adapter, output=tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_tokenizer_and_card_are_added_and_the_base_is_renamed_on_request(tmp_path: Path, trained: Trained) -> None:
    moved = trained.base.rename(tmp_path / "moved")
    export_adapter(trained.adapter, output=tmp_path / "out", base=str(moved))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == str(moved)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "| num_experts | 4 |" in card


def test_a_tokenizer_beside_the_adapter_takes_the_place_of_the_base_one(tmp_path: Path, trained: Trained) -> None:
    (trained.adapter / "chat_template.jinja").write_text("{{ 'ours' }}")
    export_adapter(trained.adapter, output=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'ours' }}"


def test_a_hub_name_is_written_into_the_card_and_a_path_is_not(tmp_path: Path, trained: Trained) -> None:
    export_adapter(trained.adapter, output=tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text().partition("```python")[0]


def test_run_checkpoint_and_adapter_folder_mean_the_newest_the_named_and_the_given(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        adapter = tmp_path / f"checkpoint-{step}" / "adapter"
        adapter.mkdir(parents=True)
        (adapter / CONFIG).write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    assert find_adapter(tmp_path) == tmp_path / "checkpoint-100" / "adapter"
    assert find_adapter(tmp_path / "checkpoint-20") == tmp_path / "checkpoint-20" / "adapter"
    assert find_adapter(tmp_path / "checkpoint-9" / "adapter") == tmp_path / "checkpoint-9" / "adapter"
    with pytest.raises(ConfigError, match=r"checkpoint \(nowhere\) holds neither adapter_config.json, nor adapter/"):
        find_adapter(Path("nowhere"))


def test_the_sample_of_the_data_stays_behind(tmp_path: Path, trained: Trained) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    trained.adapter.rename(checkpoint / "adapter")
    (checkpoint / SAMPLE_NAME).write_bytes(b"the user's data")
    for export in (export_adapter, export_exact):
        export(checkpoint, output=tmp_path / export.__name__)
        assert not list((tmp_path / export.__name__).rglob(SAMPLE_NAME))


def test_every_fault_of_the_tensors_is_named_in_one_message(trained: Trained) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q_PROJ}.goat_router"]
        tensors[f"{Q_PROJ}.goat_B"] = torch.zeros(0)
        tensors[f"{Q_PROJ}.goat_A0"] = torch.zeros(6, 32)
        tensors[f"{Q_PROJ}.goat_s"] = torch.ones(4)
        tensors["base_model.model.score.weight"] = torch.ones(2, 32)

    change_weights(trained, damage)
    with pytest.raises(ExportError) as caught:
        read_adapter(trained.adapter)
    for fault in (
        "q_proj.goat_router is missing",
        "q_proj.goat_B is empty [0]: it was saved while its parameter was sharded",
        "q_proj.goat_A0 is [6, 32], the settings say [8, 32]",
        "q_proj.goat_s has no place in this adapter (init goat, num_experts 4, adaptive_scale false, routed true)",
        "score.weight is neither a GOAT tensor nor under modules_to_save (None)",
    ):
        assert fault in str(caught.value)


def test_a_module_trained_whole_belongs_to_the_adapter(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert list(read_adapter(trained.adapter).whole) == ["lm_head.weight"]
    change_weights(trained, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(0)}))
    with pytest.raises(ExportError, match=r"lm_head.weight is empty \[0\]"):
        read_adapter(trained.adapter)


def test_a_damaged_or_absent_file_is_named(trained: Trained) -> None:
    path = trained.adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ExportError, match=r"adapter_model.safetensors cannot be read: .*"):
        read_adapter(trained.adapter)
    path.unlink()
    with pytest.raises(ExportError, match=r"has adapter_config.json but no adapter_model.safetensors"):
        read_adapter(trained.adapter)


def test_a_static_adapter_has_no_router_and_gives_the_trained_logits_bit_for_bit(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", finish=become_dense)
    export_adapter(trained.adapter, output=tmp_path / "out")
    adapter = read_adapter(tmp_path / "out")
    assert not adapter.is_routed
    assert {name for tensors in adapter.layers.values() for name in tensors} == {"A", "B", "A0", "B0"}
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=TOKENS).logits, trained.logits())
    assert "The routers left before training ended" in (tmp_path / "out" / "README.md").read_text()


def test_a_router_in_a_static_adapter_has_no_place(trained: Trained) -> None:
    change_config(trained, routed=False)
    with pytest.raises(ExportError, match=r"q_proj.goat_router has no place in this adapter \(.*routed false\)"):
        read_adapter(trained.adapter)


def test_settings_of_another_method_or_with_a_hole_are_refused(trained: Trained) -> None:
    change_config(trained, eta=..., top_k=...)
    with pytest.raises(ExportError, match=r"adapter_config.json lacks top_k, eta"):
        read_adapter(trained.adapter)
    change_config(trained, peft_type="LORA")
    with pytest.raises(ExportError, match=r"peft_type \(LORA\) is not GOAT"):
        read_adapter(trained.adapter)
    (trained.adapter / CONFIG).write_text("{")
    with pytest.raises(ExportError, match=r"adapter_config.json is not JSON: "):
        read_adapter(trained.adapter)


def test_an_absent_base_is_named_with_the_adapter_and_the_way_out(tmp_path: Path, trained: Trained) -> None:
    change_config(trained, base_model_name_or_path="/nowhere/base")
    with pytest.raises(ExportError, match=r"base \(/nowhere/base\), which .*adapter names, .*with --base PATH"):
        export_adapter(trained.adapter, output=tmp_path / "out")
    with pytest.raises(ExportError, match=r"base \(/else/where\), given with --base, is neither a model folder"):
        export_adapter(trained.adapter, output=tmp_path / "out", base="/else/where")
    change_config(trained, base_model_name_or_path=None)
    with pytest.raises(ExportError, match=r"does not say which base it was trained on; give it with --base PATH"):
        export_adapter(trained.adapter, output=tmp_path / "out")


@pytest.mark.parametrize("export", [export_adapter, export_exact, export_dense, export_lora])
def test_a_base_with_files_of_another_adapter_beside_it_is_refused_in_every_mode(
    trained: Trained, tmp_path: Path, export: Callable[..., object]
) -> None:
    # transformers would load that adapter with the base, and an export would hold the base alone.
    (Path(trained.base) / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(
        ConfigError, match=r"base \(.*\) is not only a base: .*adapter_config.json lies beside it"
    ) as raised:
        export(trained.adapter, output=tmp_path / "out")
    assert "--mode adapter" not in str(raised.value)
    assert not (tmp_path / "out").exists()
