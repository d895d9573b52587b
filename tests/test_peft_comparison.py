"""GOAT's experiments for PEFT's table have the parameters they claim, and run through PEFT's script as it stands.

The script itself is fetched for the nightly test alone, from ``PEFT_REPO`` where that names a repository.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.peft_comparison import run as comparison
from goat_ds import GoatConfig
from goat_ds.method.scaling import Scaling
from tests.launching import REPOSITORY, Done, cpu_environment
from tests.tuner.helpers import experts_of

FOLDER = REPOSITORY / "benchmarks" / "peft_comparison"
PAGE = (FOLDER / "README.md").read_text()
BUDGET = 9_175_040
NUM_TRAINED = {
    "llama-3.2-3B-rank8-experts4-mlp": 9_175_040,
    "llama-3.2-3B-rank8-experts4-mlp-zero-s8": 9_175_040,
    "llama-3.2-3B-rank8-experts4-mlp-soft": 9_175_040,
    "llama-3.2-3B-rank28-experts4-qv": 8_716_288,
}
SHAPES = {  # out features, in features
    "q_proj": (3072, 3072),
    "v_proj": (1024, 3072),
    "gate_proj": (8192, 3072),
    "up_proj": (8192, 3072),
    "down_proj": (3072, 8192),
}
NUM_BLOCKS = 28


def llama_3b() -> PreTrainedModel:
    """Build Llama-3.2-3B without a weight."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def config_of(name: str) -> Any:
    """Load an experiment's config as PEFT's script does."""
    return PeftConfig.from_pretrained(str(FOLDER / "configs" / "goat" / name))


def num_trained(config: Any) -> int:
    config.deferred = True  # there are no weights to start from
    trained, _ = get_peft_model(llama_3b(), config).get_nb_trainable_parameters()
    return int(trained)


def test_every_experiment_of_ours_is_known() -> None:
    assert NUM_TRAINED.keys() == {path.parent.name for path in FOLDER.glob("configs/*/*/adapter_config.json")}


@pytest.mark.parametrize("name", NUM_TRAINED)
def test_an_experiment_trains_as_many_parameters_as_the_page_says(name: str) -> None:
    config = config_of(name)
    assert isinstance(config, GoatConfig) and not config.deferred and config.task_type == "CAUSAL_LM"
    by_hand = 0
    for out_features, in_features in (SHAPES[module] for module in config.target_modules):
        by_hand += NUM_BLOCKS * (config.r * (out_features + in_features) + config.num_experts * in_features)
    assert num_trained(config) == by_hand == NUM_TRAINED[name]
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `goat/{name}` |"))
    assert row.endswith(f"| {by_hand:,} | {by_hand / BUDGET:.1%} |".replace("%", " %"))


def test_the_budget_is_that_of_pefts_lora() -> None:
    assert num_trained(LoraConfig(r=32, task_type="CAUSAL_LM")) == BUDGET
    assert f"{BUDGET:,}" in PAGE


def test_the_file_is_as_large_as_the_page_says() -> None:
    config = config_of("llama-3.2-3B-rank8-experts4-mlp")
    config.deferred = True
    experts = experts_of(get_peft_model(llama_3b(), config))
    num_bytes = sum(4 * parameter.numel() for layer in experts for parameter in layer.parameters())
    assert f"{num_bytes / 2**20:.1f} MiB" in PAGE


def cells(start: str) -> list[str]:
    """Return what the page's table of first steps says, module by module."""
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {start} | "))
    return [cell.strip() for cell in row.split("|")[3:-1]]


def test_the_first_steps_are_those_of_the_page() -> None:
    shapes = [SHAPES[module] for module in ("gate_proj", "down_proj", "q_proj", "v_proj")]
    lora = [2 * math.sqrt(r / (3 * i)) for r, (_, i) in zip((10, 10, 32, 32), shapes, strict=True)]
    zero = [8 * math.sqrt(2 / (3 * i)) / math.sqrt(2) for _, i in shapes[:2]]
    goat = []
    for d, (o, i) in zip((2, 2, 7, 7), shapes, strict=True):
        goat.append(math.sqrt(math.sqrt(3 * i / d) * d * (1 / i + 1 / o) / (10 * 2)))
    assert cells("LoRA") == [f"{step:.3f} (r {r})" for step, r in zip(lora, (10, 10, 32, 32), strict=True)]
    assert cells("zero start") == [*(f"{step:.3f}" for step in zero), "", ""]
    assert cells("GOAT") == [f"{step:.3f} √\N{GREEK SMALL LETTER SIGMA}" for step in goat]


@pytest.mark.parametrize("init", ["goat", "zero"])
def test_a_first_step_of_adam_moves_the_weight_as_the_formula_says(init: str) -> None:
    torch.manual_seed(0)
    out_features, in_features, rate, top_k = 384, 512, 1e-6, 2
    layer = nn.Sequential(nn.Linear(in_features, out_features, bias=False, dtype=torch.float64))
    sigma = torch.linalg.svdvals(layer[0].weight.detach())
    config = GoatConfig(r=8, num_experts=4, top_k=top_k, init=init, scaling=Scaling.ALPHA, lora_alpha=16.0)
    (experts,) = experts_of(get_peft_model(layer, config, autocast_adapter_dtype=False))
    squares = []
    for e in range(4):
        a, b = experts.A.data[2 * e : 2 * e + 2], experts.B.data[:, 2 * e : 2 * e + 2]
        moved = (b + rate * torch.randn_like(b).sign()) @ (a + rate * torch.randn_like(a).sign()) - b @ a
        squares.append((8 * moved / top_k).square().mean() * top_k / 4)  # gates 1/k, and k of 4 experts
    found = float(torch.stack(squares).sum().sqrt()) / rate
    if init == "goat":
        mean_sigma = float(sigma[experts.indices()].mean())
        expected = math.sqrt(8 * 2 * mean_sigma * (1 / in_features + 1 / out_features) / (10 * top_k))
    else:
        expected = 8 * math.sqrt(2 / (3 * in_features)) / math.sqrt(top_k)
    assert found == pytest.approx(expected, rel=0.03)


def commands() -> list[list[str]]:
    """Return the command lines of the page."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)).replace("$rate", "1e-4")
    lines = [shlex.split(line) for line in text.splitlines() if "run.py" in line]
    return [line[line.index("benchmarks/peft_comparison/run.py") + 1 :] for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_commands_of_the_page_are_understood(words: list[str]) -> None:
    given = comparison.parser().parse_args(words)
    ours = [name for name in given.experiments if name.startswith("goat/")]
    assert all((FOLDER / "configs" / name).is_dir() for name in ours)


def run(*words: str) -> Done:
    command = [sys.executable, str(FOLDER / "run.py"), *words]
    done = subprocess.run(command, env=cpu_environment(), capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


DEFAULTS = {"seed": 0, "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}
MEASURED = {"accelerator_memory_max": 0, "train_time": 9.0, "file_size": 0, "num_trainable_params": 8}
SCRIPT = """
import json, os, sys
from peft import PeftConfig
from utils import FOLDER
import peft

_, verbose, path = sys.argv
method, name = path.split("/")[1:]
config = PeftConfig.from_pretrained(path)
training = json.load(open("default_training_params.json"))
if os.path.exists(f"{path}/training_params.json"):
    training |= json.load(open(f"{path}/training_params.json"))
row = {"test accuracy": 0.5, "train loss": 1.0, "forgetting": 0.1}
train = {"accelerator_memory_max": 2**21, "train_time": 3.0, "file_size": 2**20, "num_trainable_params": 7,
         "metrics": [row], "status": "success"}
about = {"experiment_name": f"{method}/{name}", "training": training, "peft": peft.__file__,
         "kind": type(config).__name__}
with open(f"{FOLDER}/results/{method}--{name}.json", "w") as file:
    json.dump({"run_info": about, "train_info": train}, file)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a git repository of PEFT's shape, whose script writes a row without training."""
    root = tmp_path_factory.mktemp("peft")
    metamath = root / comparison.COMPARISON
    lora = metamath / "experiments" / "lora" / "r32"
    for folder in (root / "src", metamath / "results", lora):
        folder.mkdir(parents=True)
    (root / "src" / "peft").symlink_to(Path(peft.__file__).parent)
    LoraConfig(r=32).save_pretrained(lora)
    (metamath / "run.py").write_text(SCRIPT)
    (metamath / "utils.py").write_text('FOLDER = "."\n')
    (metamath / "default_training_params.json").write_text(json.dumps(DEFAULTS))
    # As before PEFT measured forgetting.
    train = MEASURED | {"metrics": [{"test accuracy": 0.4, "train loss": 2.0}]}
    row = {"run_info": {"experiment_name": "lora/r32"}, "train_info": train}
    (metamath / "results" / "lora--r32.json").write_text(json.dumps(row))
    (metamath / "cancelled_results").mkdir()
    (metamath / "cancelled_results" / ".gitkeep").touch()
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "All"]):
        subprocess.run([*git, *words], cwd=root, check=True)
    return root


def flags(repository: Path, work: Path) -> list[str]:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    return ["--peft_repo", str(repository), "--commit", head.stdout.strip(), "--work", str(work)]


@pytest.fixture
def any_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "OLDEST_PYTHON", (3, 11))


@pytest.mark.slow
@pytest.mark.usefixtures("any_python")
def test_an_experiment_runs_through_the_fetched_script_with_its_peft(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = "goat/llama-3.2-3B-rank8-experts4-mlp"
    comparison.main([ours, "--learning_rate", "0.002", "--seed", "3", *flags(repository, tmp_path)])
    (file,) = (tmp_path / "rows").iterdir()
    assert file.name == f"{ours.replace('/', '--')}-lr_0.002-seed_3.json"
    about = json.loads(file.read_text())["run_info"]
    assert about["kind"] == "GoatConfig" and Path(about["peft"]).is_relative_to(tmp_path / "main" / "src")
    assert about["training"] == {"seed": 3, "optimizer_kwargs": {"lr": 0.002, "weight_decay": 0.1}}
    out = capfd.readouterr().out
    assert f"| {ours}-lr_0.002-seed_3 | 50.0% | 1.000 | 0.100 | 7 | 2 | 3 | 1.0 |" in out
    assert "| lora/r32 (published) | 40.0% | 2.000 | nan | 8 | 0 | 9 | 0.0 |" in out


def writes(file: str, **train: Any) -> str:
    """Return a launcher that trains nothing and writes a result file."""
    row = {"run_info": {"experiment_name": "lora/r32", "error_msg": "a bad rate"}, "train_info": MEASURED | train}
    return f"import pathlib; pathlib.Path({file!r}).write_text({json.dumps(row)!r})"


@pytest.mark.usefixtures("any_python")
def test_a_row_of_pefts_own_experiment_leaves_the_published_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "HERE", tmp_path)
    metrics = [{"step": 1}, {"test accuracy": 0.6, "train loss": 1.0, "forgetting": 0.1}]
    launcher = writes("results/lora--r32.json", status="success", metrics=metrics)
    (tmp_path / "launcher.py").write_text(launcher)
    for _ in range(2):
        comparison.main(["lora/r32", *flags(repository, tmp_path)])
        rows = [line.split(" | ")[:2] for line in capfd.readouterr().out.splitlines() if line.startswith("| lora")]
        ours, published = ["| lora/r32", "60.0%"], ["| lora/r32 (published)", "40.0%"]
        assert rows == [ours, ours, published]


@pytest.mark.usefixtures("any_python")
def test_an_experiment_that_did_not_come_to_its_end_is_an_error(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "HERE", tmp_path)
    for launcher, words in (
        (
            writes("cancelled_results/lora--r32.json", status="canceled", metrics=[]),
            "lora/r32 did not come to its end: a bad rate",
        ),
        ("raise SystemExit(3)", "lora/r32: PEFT's script ended with exit code 3; its words are above"),
        ("pass", "lora/r32: PEFT's script wrote 0 result files in place of one"),
    ):
        (tmp_path / "launcher.py").write_text(launcher)
        with pytest.raises(SystemExit, match=re.escape(words)):
            comparison.main(["lora/r32", *flags(repository, tmp_path)])


def test_what_cannot_run_is_refused_in_a_sentence(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = flags(repository, tmp_path)
    comparison.main(common)
    assert {"goat/llama-3.2-3B-rank28-experts4-qv", "lora/r32"} < set(capsys.readouterr().out.splitlines())
    with pytest.raises(SystemExit, match=r"experiments \(goat/none\) are not there"):
        comparison.main(["goat/none", "--smoke", *common])
    for steps in ("0", "401"):
        with pytest.raises(SystemExit, match=rf"--smoke \({steps}\) must be 1 to 400 steps"):
            comparison.main(["lora/r32", "--smoke", steps, *common])
    with pytest.raises(SystemExit, match=r"git fetch .* failed in "):
        comparison.main(["--peft_repo", str(tmp_path / "none"), "--commit", "0" * 40, "--work", str(tmp_path)])
    # What a killed run leaves is put right.
    (tmp_path / "main" / comparison.COMPARISON / "results" / "lora--r32.json").write_text("half a r")
    comparison.main(common)
    assert "| lora/r32 (published) | 40.0% " in capsys.readouterr().out
    monkeypatch.setattr(comparison, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(SystemExit, match=r"install goat_ds under 99.0 or newer"):
        comparison.main(["lora/r32", *common])
    (tmp_path / "main" / comparison.COMPARISON / "run.py").write_text("print('mine')")
    with pytest.raises(SystemExit, match=r"is no longer as PEFT published it; delete it"):
        comparison.main(common)


@pytest.mark.slow
@pytest.mark.nightly
def test_pefts_script_trains_tests_and_writes_a_row_for_goat_and_for_lora(tmp_path: Path) -> None:
    repo = os.environ.get("PEFT_REPO", comparison.PEFT_REPO)
    where = ["--peft_repo", repo, "--work", str(tmp_path)]
    fetched = run("--smoke", *where)
    if "git fetch" in fetched.stderr:
        pytest.skip(f"PEFT cannot be fetched, and PEFT_REPO names no repository that has it: {fetched.stderr}")
    assert fetched.returncode == 0, fetched.stderr
    names = [*(f"goat/{name}" for name in NUM_TRAINED), "lora/llama-3.2-3B-rank32"]
    done = run(*names, "--smoke", "30", "--learning_rate", "3e-3", *where)
    assert done.returncode == 0, done.stderr
    assert "balance loss does not reach the gradient" not in done.stderr
    files = sorted((tmp_path / "rows").glob("*.json"))
    assert len(files) == len(names)
    for file in files:
        row = json.loads(file.read_text())
        first, last = row["train_info"]["metrics"]
        assert row["run_info"]["peft_branch"] == "smoke" and not row["run_info"]["peft_worktree_is_dirty"]
        assert row["meta_info"]["package_info"]["peft-commit-hash"] == comparison.COMMIT
        assert last["train samples"] == 30 * 16 and 0 <= last["test accuracy"] <= 1
        assert math.isfinite(last["forgetting"]) and first["train loss"] < 6
        assert 0 < row["train_info"]["file_size"] < 2**20
