"""The command a user types: what it refuses, what it leaves, how it ends."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from goat_ds import demo
from goat_ds.data.sample import load_sample
from tests.launching import FEW_HELDOUT, REPOSITORY, losses_of, metrics_of, run_program, start_ranks

TRAIN = ["launch/train.py", "--ds_config", "ds_configs/zero3.json"]
SHORT = ["--max_steps", "4", "--max_length", "64", "--r", "8", "--num_experts", "4", "--precision", "fp32"]
SHORT += ["--eval_data", str(FEW_HELDOUT)]


def caches(tmp_path: Path) -> list[str]:
    return ["--svd_cache", str(tmp_path / "svd"), "--token_cache", str(tmp_path / "tokens")]


def on_two_ranks(command: list[str], tmp_path: Path) -> tuple[list[int], str]:
    """Run a command on two ranks; return the exit code of each, and what they have printed."""
    run = start_ranks(command, world_size=2, folder=tmp_path / "printed")
    return run.wait(), run.output()


@pytest.mark.slow
def test_everything_wrong_is_told_at_once_before_a_weight_is_read(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": \n')
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text('{"colour": "red"}\n')
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "metrics.jsonl").write_text("")
    # A base without weights: reading any would fail with another message.
    base = tmp_path / "base"
    shutil.copytree(demo.base_path(), base, ignore=shutil.ignore_patterns("*.safetensors"))
    done = run_program(
        *TRAIN,
        *("--model", str(base), "--data", str(bad), "--data", str(unknown), "--data", str(tmp_path / "no.jsonl")),
        *("--output_dir", str(taken), "--target_modules", "q_porj", "--attn", "flash_attention_2"),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for words in (
        "bad.jsonl line 2",
        "unknown.jsonl line 1",
        "no.jsonl",
        f"output_dir ({taken}) is not empty",
        "target_modules (q_porj) matches no layer; linear layers are:",
        "attn (flash_attention_2) needs a CUDA device",
    ):
        assert words in done.stderr, words


@pytest.mark.slow
def test_a_layer_too_small_for_its_experts_is_refused_before_weights(tmp_path: Path) -> None:
    many = ["--r", "512", "--num_experts", "8"]
    done = run_program(*TRAIN, *caches(tmp_path), "--output_dir", str(tmp_path / "run"), *many)
    assert done.returncode == 2
    too_small = r"k_proj: \d+ x \d+ has segments of \d+ directions \(num_experts 8\), fewer than r / num_experts \(64\)"
    assert re.search(too_small, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_label_left_after_truncation_is_refused_on_every_rank(tmp_path: Path) -> None:
    command = [*TRAIN, *caches(tmp_path), "--output_dir", str(tmp_path / "run"), "--max_length", "3"]
    codes, printed = on_two_ranks(command, tmp_path)
    assert codes == [2, 2]
    assert "no label token left" in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the demo on two ranks; its folder."""
    root = tmp_path_factory.mktemp("launch")
    watched = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    watched["csv_monitor"] = {"enabled": True, "output_path": str(root / "csv"), "job_name": "demo"}
    (root / "watched.json").write_text(json.dumps(watched))
    command = ["launch/train.py", "--ds_config", str(root / "watched.json"), *SHORT, *caches(root)]
    command += ["--output_dir", str(root / "run"), "--save_steps", "2", "--eval_steps", "2"]
    codes, printed = on_two_ranks(command, root)
    assert codes == [0, 0], printed
    return root / "run"


@pytest.mark.slow
def test_a_run_leaves_metrics_and_checkpoints(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-2", "checkpoint-4", "ds_config.json", "metrics.jsonl", "routers.jsonl",
    ]  # fmt: skip
    assert len(losses_of(run)) == 4
    assert [line["step"] for line in metrics_of(run) if "eval_loss" in line] == [2, 4]
    (routers,) = [json.loads(line) for line in (run / "routers.jsonl").read_text().splitlines()]
    for layer in routers["layers"].values():
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
        assert 0 < layer["entropy"] <= torch.tensor(4.0).log().item() + 1e-6


@pytest.mark.slow
def test_every_checkpoint_keeps_the_same_sample_of_the_data(run: Path, tmp_path: Path) -> None:
    first, last = (run / f"checkpoint-{step}" / "calibration.safetensors" for step in (2, 4))
    assert first.read_bytes() == last.read_bytes()
    sample = load_sample(last)
    assert sample.max_length == 64
    # There is held-out data, and the demo has fewer tokens to train on than a sample may hold.
    demo_data = [demo.train_data(), FEW_HELDOUT]
    assert [len(part) for part in sample[:2]] == [len(path.read_text().splitlines()) for path in demo_data]
    without = ["--output_dir", str(tmp_path), "--calibration_sample_tokens", "0"]
    done = run_program(*TRAIN, *SHORT, *caches(run.parent), *without)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "checkpoint-4" / "calibration.safetensors").exists()


@pytest.mark.slow
def test_deepspeeds_monitors_get_the_same_numbers(run: Path) -> None:
    (file,) = (run.parent / "csv").rglob("*train_loss.csv")
    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    assert [float(value) for _, value in rows] == pytest.approx(losses_of(run))


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_program(*TRAIN, *SHORT, "--output_dir", str(tmp_path / "run"), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "nothing is wrong that can be known before weights are read" in done.stdout
    for words in ("plan: ", "trained: ", "a rank in training, at most: ", "smallest number of GPUs"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_plain_python_runs_the_same_program(run: Path, tmp_path: Path) -> None:
    alone = ["--output_dir", str(tmp_path / "python"), "--grad_accum_steps", "2"]
    done = run_program(*TRAIN, *SHORT, *caches(run.parent), *alone)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "python") == pytest.approx(losses_of(run), abs=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_names_step_and_records_and_leaves_the_last_checkpoint_whole(
    tmp_path: Path,
) -> None:
    data = tmp_path / "three.jsonl"
    data.write_text("".join(demo.train_data().read_text().splitlines(keepends=True)[:3]))
    # The first step throws the weights far away; the second has no finite loss. Each sees all records, on two ranks.
    flags = ["--output_dir", str(tmp_path / "run"), "--learning_rate", "1e30", "--save_steps", "1"]
    flags += ["--model", str(demo.base_path()), "--data", str(data), "--micro_batch_size", "2", "--no_packing"]
    codes, printed = on_two_ranks([*TRAIN, *SHORT, *caches(tmp_path), *flags], tmp_path)
    assert 0 not in codes
    saved = tmp_path / "run" / "checkpoint-1"
    words = rf"the loss of step 2 is (?:nan|inf).*; records of step 2: (.*); the last checkpoint before it is {saved}"
    found = re.search(words, printed)
    assert found, printed
    assert sorted(found[1].split(", ")) == [f"{data} line {number}" for number in (1, 2, 3)]
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"]
    base = AutoModelForCausalLM.from_pretrained(demo.base_path())
    PeftModel.from_pretrained(base, str(saved / "adapter"))


@pytest.mark.slow
def test_what_only_one_rank_finds_is_said_and_ends_all(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(demo.base_path(), base)
    weights = load_file(base / "model.safetensors")
    # Dearest first: of the two layers of the first wave the second rank gets the second.
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", str(base), "--data", str(demo.train_data()), "--output_dir", str(tmp_path / "run")]
    codes, printed = on_two_ranks([*TRAIN, *SHORT, *caches(tmp_path), *flags, "--adaptive_scale"], tmp_path)
    assert 0 not in codes
    assert "adaptive_scale divides" in printed, printed
    # The folder is still empty, so the mended run may use it.
    assert not list((tmp_path / "run").iterdir())
