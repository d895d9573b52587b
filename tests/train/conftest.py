"""What runs are started in and from."""

import pytest

from tests.train.faults import Laboratory


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """One for all tests."""
    return Laboratory(tmp_path_factory.mktemp("faults"))
