"""The comparisons that are shipped can be started, and take what they say."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from goat_ds import demo
from goat_ds.cli import compare as program
from goat_ds.compare.compare_file import read_settings
from goat_ds.compare.preparation import prepare
from goat_ds.compare.search import planned
from goat_ds.compare.trials import config_of, flags_of
from goat_ds.train import preflight
from goat_ds.train.inputs import read_inputs
from tests.launching import REPOSITORY
from tests.test_examples import stand_in
from tests.test_readme import after

EXAMPLES = REPOSITORY / "examples" / "compare"
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    dtype="bfloat16",
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a user does who types the commands in a clone."""
    monkeypatch.chdir(REPOSITORY)


def with_stand_ins(folder: Path, example: Path) -> Path:
    """Write an example with a base and data that are here; return its path."""
    content = yaml.safe_load(example.read_text())
    if "model" in content["train"]:
        heldout = [str(demo.heldout_data())]
        content["train"] |= {"model": stand_in(folder, "llama"), "data": [str(demo.train_data())], "eval_data": heldout}
        content["final"]["eval_data"] = heldout
    content["output_dir"] = str(folder / "out")
    (folder / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "compare.yaml"


def test_every_comparison_is_named_in_the_table_of_examples() -> None:
    named = re.findall(r"`examples/compare/(\w+\.yaml)`", (REPOSITORY / "examples" / "README.md").read_text())
    assert sorted(set(named)) == sorted(path.name for path in EXAMPLES.iterdir())


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_its_commands_name_it(name: str) -> None:
    comment = (EXAMPLES / name).read_text().partition("\n\n")[0]
    commands = [shlex.split(line) for line in re.findall(r"^#   (\S.*)$", comment, flags=re.MULTILINE)]
    assert commands and all(words[:2] == ["python", "launch/compare.py"] for words in commands)
    assert all(words[3] == f"examples/compare/{name}" for words in commands)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_the_checks_of_every_run_find_nothing_wrong(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--config", str(with_stand_ins(tmp_path, EXAMPLES / name)), "--dry_run"]) == 0
    assert "together: " in capsys.readouterr().out


def test_the_runs_of_the_day_are_those_that_the_file_says() -> None:
    counts = planned(read_settings(EXAMPLES / "llama3_8b.yaml"))
    runs, steps = sum(count.num_runs for count in counts), sum(count.num_runs * count.steps for count in counts)
    assert f"{runs} runs, {steps:,} steps" in (EXAMPLES / "llama3_8b.yaml").read_text()
    # A token takes 6 operations a parameter: forward, again for the backward, and the gradients of the inputs.
    seconds = steps * 16 * 1024 * 6 * 8.03e9 / (0.4 * 989e12)
    assert 12 < seconds / 3600 < 22


@pytest.mark.slow
def test_the_largest_run_of_the_day_fits_one_gpu_of_80_gb(tmp_path: Path) -> None:
    LLAMA_3_8B.save_pretrained(tmp_path / "base")
    settings = read_settings(EXAMPLES / "llama3_8b.yaml")
    # Routers and a start from the spectrum, of which the others lack one or both.
    flags = flags_of(settings, "goat", (), r=None)
    config = config_of(flags | {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "out")})
    inputs = read_inputs(config, world_size=1)
    assert list(preflight.plan_problems(inputs)) == []
    assert preflight.planner_of(inputs).fits(80, 1)


def test_the_file_that_the_page_shows_can_be_compared(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "compare.md").read_text(), flags=re.DOTALL)
    (tmp_path / "page.yaml").write_text(block)
    settings = read_settings(tmp_path / "page.yaml")
    assert [method.name for method in settings.methods if not settings.has_rank(method.name)] == ["full"]
    sizes = prepare(read_settings(with_stand_ins(tmp_path, tmp_path / "page.yaml")))
    assert [grid for name, grid in sizes if name == "goat"] == [(("rho", 1),), (("rho", 10),)]


def test_the_demo_compares_equal_ranks() -> None:
    sizes = prepare(read_settings(EXAMPLES / "demo.yaml"))
    assert len(sizes) == 3 and all(size.r is None for size in sizes.values())


@pytest.mark.parametrize("flags", after("launch/compare.py"), ids=" ".join)
def test_commands_of_the_pages_are_understood(flags: list[str]) -> None:
    given = program.flags_from(flags)
    # compare.yaml stands for a file of the reader's own.
    assert given.config.name == "compare.yaml" or read_settings(given.config)
