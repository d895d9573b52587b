"""A base is what its config says and nothing else: leftovers of an adapter and code of an author are refused."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from goat_ds import demo
from goat_ds.base.inspect import inspect
from goat_ds.errors import ConfigError, first_line
from tests.models import causal_lm


def with_leftovers(folder: Path) -> Path:
    """Write a base with the files of a LoRA adapter beside it, as merging in place leaves them."""
    base = folder / "base"
    causal_lm().save_pretrained(base)
    get_peft_model(causal_lm(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(base)
    assert (base / "config.json").is_file() and (base / "adapter_config.json").is_file()
    return base


def test_a_base_is_what_its_config_says() -> None:
    base = inspect(str(demo.base_path()))
    assert (base.architecture, base.num_positions, base.is_4bit) == ("llama", 2048, False)
    assert not base.is_exact_export and base.foreign_quantization is None


def test_a_folder_with_files_of_an_adapter_beside_the_base_is_refused(tmp_path: Path) -> None:
    base = with_leftovers(tmp_path)
    words = (
        rf"model \({base}\) is not only a base: .*adapter_config.json lies beside it, .* move the adapter's files out"
    )
    with pytest.raises(ConfigError, match=words):
        inspect(str(base))
    for path in base.glob("adapter_*"):
        path.unlink()
    assert inspect(str(base)).architecture == "llama"


def test_a_folder_that_is_not_there_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^model \({tmp_path}\) cannot be loaded: "):
        inspect(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^base \(x\), given with --base, cannot be loaded: "):
        inspect(str(tmp_path), named="base (x), given with --base,")


def test_a_skeleton_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    shutil.copytree(demo.base_path(), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "base" / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    base = inspect(str(tmp_path / "base"))
    skeleton = base.skeleton(unquantized=True)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not hasattr(skeleton.config, "quantization_config") and base.is_4bit


def test_the_first_line_of_an_error_is_the_first_that_says_something() -> None:
    # As bitsandbytes writes its own.
    assert first_line(RuntimeError("\n🚨 CUDA SETUP ERROR\nmore")) == "🚨 CUDA SETUP ERROR"
    assert first_line(RuntimeError("")) == "RuntimeError"
