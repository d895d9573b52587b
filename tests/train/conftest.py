"""What runs are started in and from."""

from collections.abc import Iterator

import pytest

from tests.forked_ranks import Nursery
from tests.train.faults import Laboratory


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """One for all tests of a module."""
    with Nursery() as nursery:
        yield Laboratory(tmp_path_factory.mktemp("faults"), nursery)
