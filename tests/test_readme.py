"""What the README and the pages of docs/ say can be typed, can be typed."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from goat_ds import GoatConfig
from goat_ds.base.inspect import inspect
from goat_ds.cli.evaluate import settings_from
from goat_ds.plan.skeleton import Kind, Skeleton, build
from goat_ds.train.cli import parse
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.tuner.quantized import Packing
from goat_ds.zero import ds_config
from tests.launching import REPOSITORY, run_cold, run_program

README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
TEXT = "\n".join(
    path.read_text()
    for path in (
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "ds_configs/README.md")),
        *sorted(DOCS.rglob("*.md")),
    )
)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY)) for room in ("launch", "benchmarks") for path in (REPOSITORY / room).glob("*.py")
)
INLINE = re.findall(r"`([^`\n]+)`", TEXT)
PROGRAM = re.compile(r"\bgoat-ds (\w+)")


def shell_commands() -> list[list[str]]:
    """Return the words of every command in the text, without comments and the dots that stand for more.

    ``goat-ds train`` stands for ``launch/train.py``, and so on. A script or program that is only named is no command.
    """
    blocks = [text for kind, text in BLOCKS if kind == "bash"]
    lines = [line for text in blocks for line in text.replace("\\\n", " ").splitlines()]
    lines = [PROGRAM.sub(r"launch/\1.py", line) for line in [*lines, *INLINE]]
    commands = [shlex.split(line, comments=True) for line in lines if "launch/" in line or "make " in line]
    return [[word for word in command if word != "…"] for command in commands if len(command) > 1]


def after(script: str) -> list[list[str]]:
    found = [command[command.index(script) + 1 :] for command in shell_commands() if script in command]
    # The same command stands in the README and in its page.
    return [list(flags) for flags in dict.fromkeys(map(tuple, found))]


LAUNCHED = [*after("launch/train.py"), *after("launch/torchrun_node.sh"), *after("launch/slurm.sbatch")]


@pytest.mark.parametrize("flags", LAUNCHED, ids=" ".join)
def test_training_commands_parse(flags: list[str]) -> None:
    config = parse(flags)
    if config.ds_config is not None and config.ds_config not in ds_config.shipped_files():
        assert (REPOSITORY / config.ds_config).exists()


@pytest.mark.parametrize("flags", after("launch/export.py"), ids=" ".join)
def test_export_commands_are_understood(flags: list[str]) -> None:
    done = run_program("launch/export.py", *flags)
    # The folders of the README are not here: what is refused must be the checkpoint, not a flag.
    assert "usage:" not in done.stderr
    assert "runs/first" in done.stderr


@pytest.mark.parametrize("flags", after("launch/evaluate.py"), ids=" ".join)
def test_evaluation_commands_are_understood(flags: list[str]) -> None:
    settings = settings_from(flags)
    # The folder of tasks is not here.
    assert [problem for problem in settings.problems() if "is no folder" not in problem] == []


@pytest.mark.parametrize("flags", after("launch/plan.py"), ids=" ".join)
def test_planning_commands_parse(flags: list[str]) -> None:
    ranks = flags.index("--world_size") if "--world_size" in flags else len(flags)
    parse([*flags[:ranks], *flags[ranks + 2 :]], required=("model",))


def test_make_targets_exist() -> None:
    targets = {word for command in shell_commands() if command[0] == "make" for word in command[1:2]}
    assert targets >= {"setup", "demo", "test"}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_python_blocks_compile_and_import_what_exists() -> None:
    for kind, text in BLOCKS:
        if kind == "python":
            imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
            exec(compile(ast.Module(imports, type_ignores=[]), "documents", "exec"), {})


def test_the_map_names_every_room_and_nothing_else() -> None:
    tree = README[README.index("## Map") : README.index("## More")]
    named = set(re.findall(r"^ {6}(\w+)(?:/|\.py) ", tree, flags=re.MULTILINE))
    rooms = {path.stem for path in (REPOSITORY / "goat_ds").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == rooms - {"__init__", "__pycache__"}


# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
LLAMA_3 = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}


def memory_rows(shape: tuple[int, int, int, int], folder: Path) -> list[float]:
    """Return one column of the table of memory, in GiB."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(**dict(zip(names, shape, strict=True)), vocab_size=128256, num_key_value_heads=8, head_dim=128)
    config.save_pretrained(folder)
    four_bit = planned_skeleton(folder)
    double = sum(Packing(double_quant=True).num_bytes(o * i) for o, i in four_bit.becomes_4bit.values())
    single, rest = four_bit.num_bytes(Kind.FOUR_BIT), four_bit.num_bytes(Kind.BASE)
    # bf16 values and gradients, fp32 master weights and two moments; the start is frozen.
    trained = four_bit.num_bytes(Kind.INITIAL) + four_bit.count(Kind.TRAINED) * (2 + 2 + 4 + 8)
    total = single + rest + trained
    sizes = (2 * four_bit.num_base_values, single, double, rest, trained, total, total / 8)
    return [size / 2**30 for size in sizes]


def planned_skeleton(folder: Path) -> Skeleton:
    how = dict.fromkeys(("dtype", "weight_dtype", "compute_dtype"), "bfloat16")
    return build(
        inspect(str(folder)),
        GoatConfig(r=32, num_experts=8, exclude_modules=["lm_head"]),
        dtype=torch.bfloat16,
        attention="sdpa",
        quantization=BaseQuantization(packing=Packing(), **how),
        compute_dtype=torch.bfloat16,
    )


def test_the_table_of_memory_is_computed_from_the_shapes(tmp_path: Path) -> None:
    columns = [memory_rows(shape, tmp_path) for shape in LLAMA_3.values()]
    rows = [" | ".join(f"{value:.1f}" for value in row) for row in zip(*columns, strict=True)]
    page = (DOCS / "four-bit.md").read_text()
    table = page[page.index("| base in bf16 |") :]
    written = [line.partition("|")[2].partition("|")[2].strip(" |") for line in table.splitlines()[: len(rows)]]
    assert written == rows


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(set(re.findall(r"(?:launch|benchmarks)/\w+\.py", TEXT)) | {"launch/demo.py"}))
def test_every_script_starts(script: str) -> None:
    # What users start is started as they do it once: cold.
    run = run_cold if script.startswith("launch/") else run_program
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
