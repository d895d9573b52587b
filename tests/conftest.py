"""What every test runs under."""

import pytest
import torch

from tests.forked_ranks import close_nurseries

# The models are tiny: a second thread costs more than it does, and tests run side by side.
torch.set_num_threads(1)

LONGEST = (
    "zero/test_quantize",
    "train/test_resume",
    "zero/test_trajectories_4bit",
    "zero/test_trajectories",
    "zero/test_dense_finish",
    "train/test_faults",
    "train/test_damage",
    "train/test_two_hosts",
    "distributed/test_heartbeat",
    "train/test_launchers",
    "train/test_elastic",
    "export/test_dense",
    "train/test_launch",
    "compare/test_workers",
    "test_readme",
)
"""Files whose tests take longest come first, so that no worker is alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others and the tests of a file keep their order."""

    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition(".py::")[0].removeprefix("tests/")
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_sessionfinish() -> None:
    """End what tests have forked their runs from."""
    close_nurseries()
