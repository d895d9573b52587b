"""What goat_ds says: on the first rank, unless another must say it; shown by programs, and never by the library."""

import logging
import subprocess
import sys

import pytest
from tqdm import tqdm

from goat_ds.distributed import messages, ranks
from goat_ds.distributed.messages import ON_ANY_RANK
from tests.launching import REPOSITORY, cpu_environment

Printed = pytest.CaptureFixture[str]

logger = logging.getLogger("goat_ds.train.loop")


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_says_what_all_know(rank: int, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(ranks, "get_rank", lambda: rank)
    with messages.shown():
        logger.info("GOAT start: 3 layers")
        logger.warning("save_total_limit (2) could not delete")
    printed = capsys.readouterr()
    assert printed.out == ("" if rank else "GOAT start: 3 layers\nwarning: save_total_limit (2) could not delete\n")
    assert not printed.err


@pytest.mark.parametrize("rank", [0, 3])
def test_any_rank_says_what_only_it_knows(rank: int, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(ranks, "get_rank", lambda: rank)
    with messages.shown():
        logger.info("100 % of the cache is damaged", extra=ON_ANY_RANK)
    assert capsys.readouterr().out == "100 % of the cache is damaged\n"


def test_lines_leave_a_progress_bar_whole(capsys: Printed) -> None:
    with messages.shown(), tqdm(total=2, desc="train", file=sys.stdout, ncols=40) as bar:
        logger.info("data: a.jsonl")
        bar.update()
    lines = [line for line in capsys.readouterr().out.replace("\r", "\n").split("\n") if line.strip()]
    assert "data: a.jsonl" in lines


def test_logging_is_afterwards_as_before(capsys: Printed, caplog: pytest.LogCaptureFixture) -> None:
    ours = logging.getLogger("goat_ds")
    before = ours.level, ours.propagate, list(ours.handlers)
    with messages.shown():
        logger.info("shown")
    assert (ours.level, ours.propagate, ours.handlers) == before
    logger.warning("left to the user's own logging")
    assert capsys.readouterr().out == "shown\n"
    assert caplog.messages == ["left to the user's own logging"]


def test_a_line_is_shown_once_where_a_library_has_set_logging_up_for_all(capsys: Printed) -> None:
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        with messages.shown():
            logger.warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out == "warning: once\n"


def test_the_library_prints_nothing_by_itself() -> None:
    code = "import logging, goat_ds; logging.getLogger('goat_ds.zero').warning('unseen')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cpu_environment(), cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
