"""The command a user types: what it refuses, what it leaves, how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from goat_ds import demo
from goat_ds.data.sample import load_sample
from tests.launching import REPOSITORY, cpu_environment, free_port, losses_of, metrics_of

TRAIN = ["launch/train.py", "--ds_config", "ds_configs/zero3.json"]
SHORT = ["--max_steps", "4", "--max_length", "64", "--r", "8", "--num_experts", "4", "--precision", "fp32"]


def launch(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=cpu_environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False
    )


def caches(tmp_path: Path) -> list[str]:
    return ["--svd_cache", str(tmp_path / "svd"), "--token_cache", str(tmp_path / "tokens")]


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
    done = launch(
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
    done = launch(*TRAIN, *caches(tmp_path), "--output_dir", str(tmp_path / "run"), "--r", "512", "--num_experts", "8")
    assert done.returncode == 2
    too_small = r"k_proj: \d+ x \d+ has segments of \d+ directions \(num_experts 8\), fewer than r / num_experts \(64\)"
    assert re.search(too_small, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_label_left_after_truncation_is_refused_on_every_rank(tmp_path: Path) -> None:
    done = deepspeed_launch(*TRAIN, *caches(tmp_path), "--output_dir", str(tmp_path / "run"), "--max_length", "3")
    assert done.returncode != 0
    assert "no label token left" in done.stderr + done.stdout


def deepspeed_launch(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    return subprocess.run(
        [*launcher, "--master_port", str(free_port()), *arguments],
        env=cpu_environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the demo under the deepspeed launcher; give its folder."""
    root = tmp_path_factory.mktemp("launch")
    watched = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    watched["csv_monitor"] = {"enabled": True, "output_path": str(root / "csv"), "job_name": "demo"}
    (root / "watched.json").write_text(json.dumps(watched))
    done = deepspeed_launch(
        *("launch/train.py", "--ds_config", str(root / "watched.json"), *SHORT, *caches(root)),
        *("--output_dir", str(root / "run"), "--save_steps", "2", "--eval_steps", "2"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "run"


@pytest.mark.slow
def test_the_deepspeed_launcher_leaves_metrics_and_checkpoints(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-2", "checkpoint-4", "metrics.jsonl", "routers.jsonl",
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
    # The demo has held-out data of its own, and fewer tokens to train on than a sample may hold.
    demo_data = [demo.train_data(), demo.heldout_data()]
    assert [len(part) for part in sample[:2]] == [len(path.read_text().splitlines()) for path in demo_data]
    done = launch(
        *TRAIN, *SHORT, *caches(run.parent), "--output_dir", str(tmp_path), "--calibration_sample_tokens", "0"
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "checkpoint-4" / "calibration.safetensors").exists()


@pytest.mark.slow
def test_deepspeeds_monitors_get_the_same_numbers(run: Path) -> None:
    (file,) = (run.parent / "csv").rglob("*train_loss.csv")
    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    assert [float(value) for _, value in rows] == pytest.approx(losses_of(run))


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    done = launch(*TRAIN, *SHORT, "--output_dir", str(tmp_path / "run"), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "nothing is wrong that can be known before weights are read" in done.stdout
    for words in ("plan: ", "trained: ", "a rank in training, at most: ", "smallest number of GPUs"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_and_plain_python_run_the_same_program(run: Path, tmp_path: Path) -> None:
    same = [*TRAIN, *SHORT, *caches(run.parent), "--output_dir"]
    # Without "--" torchrun takes our --r for an abbreviation of one of its own flags.
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "--"]
    done = launch(*torchrun, *same, str(tmp_path / "torchrun"))
    assert done.returncode == 0, done.stderr
    done = launch(*same, str(tmp_path / "python"), "--grad_accum_steps", "2")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "torchrun") == pytest.approx(losses_of(run), abs=1e-6)
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
    done = deepspeed_launch(*TRAIN, *SHORT, *caches(tmp_path), *flags)
    assert done.returncode != 0
    saved = tmp_path / "run" / "checkpoint-1"
    words = rf"the loss of step 2 is (?:nan|inf).*; records of step 2: (.*); the last checkpoint before it is {saved}"
    found = re.search(words, done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
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
    done = deepspeed_launch(*TRAIN, *SHORT, *caches(tmp_path), *flags, "--adaptive_scale")
    assert done.returncode != 0
    assert "adaptive_scale divides" in done.stdout + done.stderr, done.stderr
    # The folder is still empty, so the mended run may use it.
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_ranks_within_thirty_seconds(tmp_path: Path) -> None:
    long_run = ["--max_steps", "100000", "--output_dir", str(tmp_path / "run"), *caches(tmp_path)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    process = subprocess.Popen(
        [*launcher, "--master_port", str(free_port()), *TRAIN, *SHORT[2:], *long_run],
        env=cpu_environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        victim = rank_processes(process.pid)[1]
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        process.communicate(timeout=30)
        assert process.returncode != 0
        assert time.monotonic() - died < 30
        assert not rank_processes(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: object, process: subprocess.Popen[str], *, seconds: float = 240) -> None:
    began = time.monotonic()
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < seconds
        time.sleep(0.5)


def rank_processes(session: int) -> list[int]:
    """List the processes of a session that run ``launch/train.py --local_rank``, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            in_session = entry.name.isdigit() and os.getsid(int(entry.name)) == session
        except (OSError, ValueError):
            # It ended while being looked at, or is no process.
            continue
        ranks = [word for word in words if word.startswith(b"--local_rank=")]
        if in_session and ranks and b"launch/train.py" in words and b"deepspeed.launcher.launch" not in words:
            found[ranks[0]] = int(entry.name)
    return [found[rank] for rank in sorted(found)]
