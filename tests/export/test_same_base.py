"""An adapter leaves on the weights it was trained on, wherever and in whatever files they are, and on no others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from goat_ds.errors import ExportError
from goat_ds.export import MergeBase, export_adapter, export_exact
from tests.export.conftest import ARCHITECTURES, Trained, adapt, in_4bit, store_4bit, train, write_base

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODES: list[Callable[..., Any]] = [export_adapter, export_exact]
OTHER_WEIGHTS = r"base \(.*other\): its weights are not those that .*adapter was trained on; give the base of training"


def other_base(trained: Trained) -> Path:
    """Return a base that differs in one adapted layer, as another checkpoint of the same model would in all."""
    folder = trained.base.with_name("other")
    shutil.copytree(trained.base, folder)
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith(("down_proj.weight", "mlp.c_proj.weight", "o_proj.weight")))
    weights[key] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("export", MODES)
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_other_weights_are_refused_and_nothing_is_written(
    architecture: str, export: Callable[..., Any], tmp_path: Path
) -> None:
    trained = train(tmp_path, architecture)
    export(trained.adapter, output=tmp_path / "out")
    with pytest.raises(ExportError, match=OTHER_WEIGHTS):
        export(trained.adapter, output=tmp_path / "refused", base=str(other_base(trained)))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("export", MODES)
def test_a_base_with_fewer_layers_is_refused(export: Callable[..., Any], tmp_path: Path, trained: Trained) -> None:
    config = type(ARCHITECTURES["llama"])(**ARCHITECTURES["llama"].to_dict() | {"num_hidden_layers": 1})
    write_base(tmp_path / "other", config)
    with pytest.raises(ExportError, match=r"its weights are not those|the base has no such linear layer"):
        export(trained.adapter, output=tmp_path / "out", base=str(tmp_path / "other"))


@pytest.mark.parametrize("export", MODES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"residual": "fold"}, {"init": "zero"}, in_4bit(dtype=torch.bfloat16, compute="bfloat16")],
    ids=["lowrank", "fold", "zero", "4-bit"],
)
def test_the_same_weights_are_known_in_wider_and_split_files(
    settings: dict[str, Any], export: Callable[..., Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    write_base(base, ARCHITECTURES["llama"], max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    trained = adapt(base, tmp_path / "adapter", **{"load": {"dtype": torch.bfloat16}} | settings)
    export(trained.adapter, output=tmp_path / "out", base=str(base.rename(tmp_path / "moved")))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("export", MODES)
def test_a_tied_output_layer_is_known_by_the_embedding(export: Callable[..., Any], tmp_path: Path) -> None:
    trained = train(tmp_path, "llama_tied", target_modules=["lm_head"])
    export(trained.adapter, output=tmp_path / "out")
    write_base(tmp_path / "other", ARCHITECTURES["llama_tied"], seed=1)
    with pytest.raises(ExportError, match=r"its weights are not those"):
        export(trained.adapter, output=tmp_path / "refused", base=str(tmp_path / "other"))


@pytest.mark.parametrize("export", MODES)
def test_what_cannot_be_known_is_not_refused(export: Callable[..., Any], tmp_path: Path, trained: Trained) -> None:
    stored = store_4bit(trained.base, tmp_path / "in 4 bits")
    # What only an exact export is asked.
    choice = {"merge_base": MergeBase.DEQUANT_W4} if export is export_exact else {}
    export(trained.adapter, output=tmp_path / "stored", base=str(stored), **choice)
    config = trained.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_fingerprint": None}))
    export(trained.adapter, output=tmp_path / "unknown", base=str(other_base(trained)))


def test_an_adapter_leaves_without_the_weights_of_its_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base, ARCHITECTURES["llama"], max_shard_size="20KB")
    trained = adapt(base, tmp_path / "adapter")
    # As in the cache of the hub, where the index may be without its files.
    for file in base.glob("*.safetensors"):
        file.unlink()
    export_adapter(trained.adapter, output=tmp_path / "out")
