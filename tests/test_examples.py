"""Examples can be run: settings pass the checks of a run and fit the GPUs that they name, and the script trains."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import goat_ds
from goat_ds import demo
from goat_ds.train import preflight
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.inputs import read_inputs
from goat_ds.train.resume import look
from tests.launching import REPOSITORY
from tests.models import CAUSAL_LMS, causal_lm, token_ids
from tests.tuner.test_trainers import word_tokenizer

EXAMPLES = REPOSITORY / "examples"
SETTINGS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a user does who types the commands in a clone."""
    monkeypatch.chdir(REPOSITORY)


def commands_of(name: str) -> list[list[str]]:
    """Return the words of the commands in the first comment of an example."""
    comment = (EXAMPLES / name).read_text().partition("\n\n")[0]
    return [shlex.split(line) for line in re.findall(r"^#   (\S.*)$", comment, flags=re.MULTILINE)]


def flags_after(script: str, name: str) -> list[list[str]]:
    return [command[command.index(script) + 1 :] for command in commands_of(name) if script in command]


def stand_in(folder: Path, name: str) -> str:
    """Write a tiny base of an example's architecture, without weights, with the demo's tokenizer; return its folder."""
    kind = "gemma3" if "gemma" in name else "llama"
    shutil.copytree(demo.base_path(), folder / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tiny = CAUSAL_LMS[kind].to_dict() | {"vocab_size": 1024, "max_position_embeddings": 8192, "dtype": "bfloat16"}
    tiny |= {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "pad_token_id": 3}
    (folder / "base" / "config.json").write_text(json.dumps(tiny))
    return str(folder / "base")


def with_stand_ins(folder: Path, name: str, *flags: str) -> TrainConfig:
    """Return the settings of an example, with a base, data and folders that are here."""
    places = {"model": stand_in(folder, name), "data": demo.train_data(), "eval_data": demo.heldout_data()}
    places |= {kind: folder / kind for kind in ("output_dir", "svd_cache", "token_cache")}
    own = [word for place, path in places.items() for word in (f"--{place}", str(path))]
    return parse(["--config", f"examples/{name}", *own, *flags])


def test_every_example_is_in_the_table_and_tried_here() -> None:
    files = {f"examples/{path.name}" for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py")}
    table = re.findall(r"^\| `(\S+)` \|", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert set(table) == files == {*(f"examples/{name}" for name in SETTINGS), "examples/trl_sft.py"}


@pytest.mark.parametrize("name", SETTINGS)
def test_its_commands_name_it_and_parse(name: str) -> None:
    scripts = ("launch/train.py", "launch/torchrun_node.sh", "launch/slurm.sbatch")
    found = [flags for script in scripts for flags in flags_after(script, name)]
    assert found and all(f"examples/{name}" in flags for flags in found)
    for flags in found:
        # Everything that a run needs stands in the file: what is not given here has the value that is written there.
        config, content = parse(flags), yaml.safe_load((EXAMPLES / name).read_text())
        assert {key: getattr(config, key) for key in content} == content


@pytest.mark.parametrize("name", SETTINGS)
def test_the_checks_of_a_run_find_nothing_wrong(name: str, tmp_path: Path) -> None:
    config = with_stand_ins(tmp_path, name)
    found = [*preflight.problems(look(config), read_inputs(config)), *preflight.data_problems(config)]
    assert found == []


LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    dtype="bfloat16",
)
LLAMA_3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    dtype="bfloat16",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "base"), [("llama_2_7b_4bit.yaml", LLAMA_2_7B), ("llama_3_70b_4bit.yaml", LLAMA_3_70B)]
)
def test_the_real_architecture_fits_the_gpus_that_the_table_names(name: str, base: LlamaConfig, tmp_path: Path) -> None:
    row = re.search(
        rf"`examples/{name}`.*\| (\d+) nodes with (\d+) GPUs of (\d+) GB", (EXAMPLES / "README.md").read_text()
    )
    assert row is not None
    nodes, per_node, gpu_gib = map(int, row.groups())
    (flags,) = flags_after("launch/plan.py", name)
    assert flags[-2:] == ["--world_size", str(nodes * per_node)]
    base.save_pretrained(tmp_path / "base")
    config = parse([*flags[:-2], "--model", str(tmp_path / "base")], required=preflight.REQUIRED_TO_PLAN)
    inputs = read_inputs(config, world_size=nodes * per_node)
    assert list(preflight.plan_problems(inputs)) == []
    planner = preflight.planner_of(inputs)
    assert planner.fits(gpu_gib, nodes * per_node)
    torchrun = next(command for command in commands_of(name) if "launch/torchrun_node.sh" in command)
    assert torchrun[1:3] == [f"NODES={nodes}", f"RANKS={per_node}"]


# trl 1.16 knows checkpointing by the name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"], ["--load_in_4bit"]], ids=" ".join)
def test_the_script_for_trl_trains_an_adapter_that_loads(more: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install goat_ds[trl]")
    causal_lm().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    lines = [{"prompt": f"w{index} w7", "completion": f" w{index + 1}"} for index in range(10, 18)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    places = {"model": tmp_path / "base", "data": tmp_path / "train.jsonl", "output": tmp_path / "out"}
    sizes = {"r": 8, "num_experts": 4, "max_steps": 2, "grad_accum_steps": 2, "learning_rate": 0.1}
    flags = [word for name, value in {**places, **sizes}.items() for word in (f"--{name}", str(value))]
    runpy.run_path(str(EXAMPLES / "trl_sft.py"))["main"]([*flags, *more])
    as_trained = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if "--load_in_4bit" in more else None
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=as_trained)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    config: Any = loaded.peft_config["default"]
    assert isinstance(config, goat_ds.GoatConfig) and (config.r, config.num_experts) == (8, 4)
    with torch.no_grad(), loaded.disable_adapter():
        before = loaded(token_ids(1, 5)).logits
    with torch.no_grad():
        assert not torch.equal(loaded(token_ids(1, 5)).logits, before)
