"""Run GOAT, and PEFT's own methods, through PEFT's method comparison (MetaMathQA) as it stands, each for one row.

    python benchmarks/peft_comparison/run.py goat/llama-3.2-3B-rank8-experts4-mlp lora/llama-3.2-3B-rank32

PEFT's repository is fetched at one commit and never changed: its script trains and judges, with the PEFT of that
commit. The experiments of ``configs/`` are put beside PEFT's own, and ``launcher.py`` makes GOAT known before the
script starts.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PEFT_REPO = "https://github.com/huggingface/peft"
COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
"""The newest that GOAT was run with."""
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIGS = HERE / "configs"
DEMO_BASE = REPOSITORY / "goat_ds" / "demo" / "base"
COMPARISON = Path("method_comparison", "MetaMathQA")
EXPERIMENTS = "experiments"
CONFIG_FILE, TRAINING_FILE = "adapter_config.json", "training_params.json"
OLDEST_PYTHON = (3, 12)
MOST_SMOKE_STEPS = 400
SMOKE_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""A second thread costs the demo's small base more than it does."""
MIB = 2**20


class Row(NamedTuple):
    """What PEFT's table says of one experiment."""

    experiment: str
    test_accuracy: float
    train_loss: float
    forgetting: float
    num_trained: int
    peak_mem_mib: float
    train_time_s: float
    file_mib: float

    def cells(self) -> list[str]:
        """Return the row as text."""
        return [
            self.experiment,
            f"{self.test_accuracy:.1%}",
            f"{self.train_loss:.3f}",
            f"{self.forgetting:.3f}",
            f"{self.num_trained:,}",
            f"{self.peak_mem_mib:,.0f}",
            f"{self.train_time_s:,.0f}",
            f"{self.file_mib:,.1f}",
        ]


HEADER = ["experiment", "test accuracy", "train loss", "forgetting", "trained", "peak MiB", "train s", "file MiB"]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("experiments", nargs="*", help="method/name; none: list what there is, with PEFT's own results")
    made.add_argument("--learning_rate", type=float, help="in place of the experiment's own, ours and PEFT's alike")
    made.add_argument("--seed", type=int, help="in place of the experiment's own")
    made.add_argument(
        "--smoke",
        type=int,
        nargs="?",
        const=60,
        metavar="STEPS",
        help="try the whole way on the embedded demo and its data, without a hub or a GPU; nothing it prints is a row",
    )
    made.add_argument("--work", type=Path, default=REPOSITORY / "build" / "peft_comparison", help="folder for it all")
    made.add_argument("--peft_repo", default=PEFT_REPO, help="address or folder of a git repository with the commit")
    made.add_argument("--commit", default=COMMIT, help="of PEFT, its whole hash")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, place, run and print."""
    given = parser().parse_args(arguments)
    _check(given)
    # PEFT's script calls a run a test, and keeps it apart, where the branch is not main.
    branch = "main" if given.smoke is None else "smoke"
    checkout = fetch(given.peft_repo, given.commit, folder=given.work.resolve() / branch, branch=branch)
    comparison = checkout / COMPARISON
    place_configs(comparison)
    if unknown := sorted(set(given.experiments) - set(names(comparison))):
        raise SystemExit(f"experiments ({', '.join(unknown)}) are not there; without any, run.py lists what there is")
    if not given.experiments:
        print("\n".join([*names(comparison), "", table(published(comparison))]))
        return
    rows = []
    for name in given.experiments:
        derived = derive(comparison, name, changes=_changes(given), suffix=_suffix(given))
        rows.append(run(checkout, derived, rows=given.work.resolve() / "rows", smoke=given.smoke is not None))
        print(table(rows), flush=True)
    if given.smoke is None:
        print(table([*rows, *published(comparison)]))


def _check(given: argparse.Namespace) -> None:
    if given.smoke is None and given.experiments and sys.version_info < OLDEST_PYTHON:
        raise SystemExit(
            f"PEFT's script cannot measure an adapter's file under Python {sys.version.split()[0]}; install goat_ds "
            f"under {'.'.join(map(str, OLDEST_PYTHON))} or newer, or only try everything out with --smoke"
        )
    if given.smoke is not None and not 1 <= given.smoke <= MOST_SMOKE_STEPS:
        raise SystemExit(f"--smoke ({given.smoke}) must be 1 to {MOST_SMOKE_STEPS} steps, for which the demo has data")


def fetch(repo: str, commit: str, *, folder: Path, branch: str) -> Path:
    """Check a commit out into a folder of its own, on a branch; what is there already is not fetched again.

    Raises:
        SystemExit: it cannot be fetched, or a file of PEFT's was changed in the folder.
    """
    # Git runs in the folder, from where a relative path is another one.
    repo = str(Path(repo).resolve()) if Path(repo).exists() else repo
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet")
    if git(folder, "cat-file", "-e", f"{commit}^{{commit}}", check=False).returncode:
        git(folder, "fetch", "--quiet", "--depth", "1", repo, commit)
    # A run that was killed may have left a row where PEFT's own was.
    but_rows = f":(exclude){COMPARISON / 'results'}"
    if changed := git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", but_rows).stdout.strip():
        raise SystemExit(f"{folder} is no longer as PEFT published it; delete it, and it is fetched again:\n{changed}")
    git(folder, "checkout", "--quiet", "--force", "-B", branch, commit)
    return folder


def git(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in a folder.

    Raises:
        SystemExit: it fails.
    """
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"git {' '.join(words)} failed in {folder}: {done.stderr.strip()}")
    return done


def place_configs(comparison: Path) -> None:
    """Put the experiments of ``configs/`` where PEFT's script looks for them."""
    shutil.copytree(CONFIGS, comparison / EXPERIMENTS, dirs_exist_ok=True)


def names(comparison: Path) -> Iterator[str]:
    """Yield the experiments that can be run, as the command line names them."""
    for folder in sorted((comparison / EXPERIMENTS).glob("*/*/")):
        # Full fine-tuning has no config of an adapter.
        if (folder / CONFIG_FILE).exists() or (folder / TRAINING_FILE).exists():
            yield str(folder.relative_to(comparison / EXPERIMENTS))


def derive(comparison: Path, name: str, *, changes: dict[str, Any], suffix: str) -> str:
    """Write an experiment that differs from another in what it is trained with; return its name."""
    if not changes:
        return name
    folder, derived = comparison / EXPERIMENTS / name, f"{name}{suffix}"
    own = folder / TRAINING_FILE
    training = {**_read(comparison / "default_training_params.json"), **(_read(own) if own.exists() else {})}
    # PEFT's script replaces a setting whole, so the others of the optimizer are written again.
    optimizer = {**training["optimizer_kwargs"], **changes.get("optimizer_kwargs", {})}
    target = comparison / EXPERIMENTS / derived
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / TRAINING_FILE).write_text(json.dumps({**training, **changes, "optimizer_kwargs": optimizer}, indent=2))
    return derived


def _changes(given: argparse.Namespace) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if given.smoke is not None:
        changes |= {
            "model_id": str(DEMO_BASE),
            "max_steps": given.smoke,
            "eval_steps": given.smoke,
            "batch_size": 16,
            "generation_kwargs": {"max_length": 128, "max_new_tokens": 24},
        }
    if given.learning_rate is not None:
        changes["optimizer_kwargs"] = {"lr": given.learning_rate}
    if given.seed is not None:
        changes["seed"] = given.seed
    return changes


def _suffix(given: argparse.Namespace) -> str:
    parts = {"lr": given.learning_rate, "seed": given.seed}
    suffix = "".join(f"-{name}_{value}" for name, value in parts.items() if value is not None)
    return suffix if given.smoke is None else f"{suffix}-smoke"


def run(checkout: Path, name: str, *, rows: Path, smoke: bool) -> Row:
    """Run one experiment in a process of its own, as its memory is measured; keep the file that it writes.

    Raises:
        SystemExit: it did not come to its end.
    """
    comparison = checkout / COMPARISON
    before = set(_result_files(comparison))
    paths = [str(checkout / "src"), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (SMOKE_ENVIRONMENT if smoke else {})
    launcher = [str(HERE / "launcher.py"), *(["--stand_ins"] if smoke else [])]
    script = ["run.py", "--verbose", *(["--clean"] if smoke else []), f"{EXPERIMENTS}/{name}"]
    done = subprocess.run([sys.executable, *launcher, *script], cwd=comparison, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: PEFT's script ended with exit code {done.returncode}; its words are above")
    written = [item for item in _result_files(comparison) if item not in before]
    if len(written) != 1:
        raise SystemExit(f"{name}: PEFT's script wrote {len(written)} result files in place of one")
    path = written[0].path
    rows.mkdir(parents=True, exist_ok=True)
    kept = Path(shutil.copy(path, rows))
    # An experiment of PEFT's own has written over the row that PEFT published.
    git(checkout, "checkout", "--quiet", "--", str(COMPARISON / "results"))
    print(f"{name}: {kept}", flush=True)
    result = _read(kept)
    if result["train_info"]["status"] != "success":
        raise SystemExit(f"{name} did not come to its end: {result['run_info']['error_msg']}")
    return row_of(result)


class _ResultFile(NamedTuple):
    path: Path
    changed_ns: int


def _result_files(comparison: Path) -> Iterator[_ResultFile]:
    for folder in ("results", "temporary_results", "cancelled_results"):
        for path in (comparison / folder).glob("*.json"):
            yield _ResultFile(path, path.stat().st_mtime_ns)


def row_of(result: dict[str, Any]) -> Row:
    """Return the row of a result file, whose last metrics are those of the test."""
    train, last = result["train_info"], result["train_info"]["metrics"][-1]
    return Row(
        experiment=result["run_info"]["experiment_name"],
        test_accuracy=last["test accuracy"],
        train_loss=last["train loss"],
        forgetting=last.get("forgetting", float("nan")),
        num_trained=train["num_trainable_params"],
        peak_mem_mib=train["accelerator_memory_max"] / MIB,
        train_time_s=train["train_time"],
        file_mib=train["file_size"] / MIB,
    )


def published(comparison: Path) -> list[Row]:
    """Return the rows that PEFT has published at this commit, marked as such."""
    files = git(comparison, "ls-files", "results/*.json").stdout.split()
    rows = (row_of(_read(comparison / file)) for file in files)
    return [row._replace(experiment=f"{row.experiment} (published)") for row in rows]


def table(rows: Iterable[Row]) -> str:
    """Return rows as a table, the best accuracy first."""
    best_first = sorted(rows, key=lambda row: -row.test_accuracy)
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in best_first)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
