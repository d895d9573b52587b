"""The README stays short, and the pages of docs/ are all reached and build without a warning."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launching import REPOSITORY

DOCS = REPOSITORY / "docs"
README_BYTES = 10_000


def nav_pages(entries: list[Any]) -> list[str]:
    """Return the pages of a part of the nav, in its order."""
    pages: list[str] = []
    for entry in entries:
        below = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += nav_pages(below) if isinstance(below, list) else [below]
    return pages


def nav() -> list[str]:
    return nav_pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])


def linked_files(path: Path) -> set[Path]:
    """Return the files of this repository that a page links to or shows."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text())
    return {(path.parent / target).resolve() for target in targets if "://" not in target}


def test_the_readme_has_at_most_10_000_bytes() -> None:
    assert len((REPOSITORY / "README.md").read_bytes()) <= README_BYTES


def test_every_page_is_in_the_nav_once() -> None:
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(nav()) == pages


def test_the_readme_links_to_every_page_or_to_the_file_that_it_shows() -> None:
    linked = linked_files(REPOSITORY / "README.md")
    pages = {DOCS / page for page in nav() if not page.startswith("api/") and page != "index.md"}
    shown = {page: re.match(r'--8<-- "(.+)"', page.read_text()) for page in pages}
    reached = {REPOSITORY / match[1] if match else page for page, match in shown.items()}
    assert reached <= linked


def measured_rows(path: Path) -> dict[str, str]:
    """Return what the table of measurements of a page says was measured, by the command that shows it."""
    table = re.search(r"^\| claim \| measured \| command \|\n.*?\n((?:\|.*\n)+)", path.read_text(), re.MULTILINE)
    assert table is not None
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]
    shown: dict[str, str] = {}
    for _, measured, command in rows:
        shown[command] = f"{shown.get(command, '')} {measured}"
    return shown


def test_the_readme_shows_eight_measurements_with_the_numbers_of_their_page() -> None:
    short, whole = measured_rows(REPOSITORY / "README.md"), measured_rows(DOCS / "measurements.md")
    assert len(short) == 8 and short.keys() <= whole.keys()
    for command, measured in short.items():
        numbers = set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", measured))
        assert numbers and numbers <= set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", whole[command])), command


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "examples/README.md", "docs/index.md"])
def test_links_lead_to_files_that_are_here(name: str) -> None:
    assert [path for path in linked_files(REPOSITORY / name) if not path.exists()] == []


def test_the_index_lists_every_page() -> None:
    assert linked_files(DOCS / "index.md") == {DOCS / page for page in nav() if not page.startswith("api/")} - {
        DOCS / "index.md"
    } | {DOCS / "api" / "index.md"}


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the docs of a clone as ``make docs`` does."""
    (command,) = re.findall(
        r"^docs: setup\n\t.*mkdocs (build .*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
    )
    # Offline: whatever is fetched would have to go through a proxy that is not there.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", *command.split(), "--site-dir", str(site)],
        cwd=root,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_docs_build_without_a_warning_and_fetch_nothing(tmp_path: Path) -> None:
    done = build(REPOSITORY, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    front_door = (tmp_path / "site" / "api" / "front-door.html").read_text()
    assert 'id="goat_ds.GoatConfig"' in front_door and 'id="goat_ds.with_balance_loss"' in front_door
    # Nothing is fetched when a page is read either.
    pages = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert re.findall(r"<(?:link|script|img)[^>]+(?:src|href)=\"https?:[^\"]*\"", pages) == []


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    for name in ("docs", "ds_configs", "examples"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ("mkdocs.yml", "LOG.md", "CONTRIBUTING.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "goat_ds").symlink_to(REPOSITORY / "goat_ds")
    with (tmp_path / "docs" / "data.md").open("a") as page:
        page.write("[nowhere](nowhere.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "'data.md' contains a link 'nowhere.md'" in done.stderr


@pytest.mark.parametrize("room", ["goat_ds", "goat_ds.export", "goat_ds.evaluate", "goat_ds.plan", "goat_ds.method"])
def test_every_public_door_is_in_the_api_reference(room: str) -> None:
    pages = "\n".join(path.read_text() for path in DOCS.rglob("*.md"))
    assert re.findall(rf"^::: {re.escape(room)}$", pages, flags=re.MULTILINE) == [f"::: {room}"]


PRINTED = """
$ python goat_ds/demo/exam.py --data heldout.jsonl --model base
  'Sort these.\\n\\n8 5': '' (expected '5 8')
  'What is the capital of Fluria?': 'of the of' (expected 'Maro')
  "Whose is it?": "no one's" (expected "Ann's")
exact match 0.0% of 265
$ deepspeed --num_gpus 2 launch/train.py
$ python goat_ds/demo/exam.py --data heldout.jsonl --model exact
  'Sort these.\\n\\n8 5': '5 8' (expected '5 8')
  'What is the capital of Fluria?': 'Maro' (expected 'Maro')
  "Whose is it?": "Ann's" (expected "Ann's")
exact match 99.2% of 265

76 s; the model is in runs/make-demo-1/exact
"""
METRICS = """
{"step": 1, "loss": 4.5, "lr": 0.1}
{"step": 2, "loss": 0.5, "lr": 0.1}
{"step": 2, "eval_loss": 0.4}
"""


def test_the_numbers_of_the_picture_are_those_that_the_demo_left() -> None:
    draw_demo = runpy.run_path(str(REPOSITORY / "tools" / "draw_demo.py"))
    shown = draw_demo["numbers"](PRINTED.strip() + "\n", METRICS.strip())
    asked = {"asked": "What is the capital of Fluria?", "before": "of the of", "after": "Maro", "expected": "Maro"}
    assert shown == {
        "losses": [[1, 4.5], [2, 0.5]],
        "num_questions": 265,
        "exact_match": [0.0, 99.2],
        "question": asked,
    }
    picture = draw_demo["draw"](shown)
    assert "before: 0.0 %" in picture and "after: 99.2 %" in picture


def test_the_picture_of_the_demo_is_drawn_from_its_numbers() -> None:
    draw = runpy.run_path(str(REPOSITORY / "tools" / "draw_demo.py"))["draw"]
    assert draw(json.loads((DOCS / "demo.json").read_text())) == (DOCS / "demo.svg").read_text()
