"""What every test runs under."""

import torch

from tests.forked_ranks import close_nurseries

# The models are tiny: a second thread costs more than it does, and tests run side by side.
torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    """End what tests have forked their runs from."""
    close_nurseries()
