"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# before torch is imported anywhere: the suite's processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often tests/distributed/test_kills.py kills its run")


@pytest.fixture(scope="session")
def workers() -> Iterator[object]:
    """Four processes for the distributed tests, started at first use."""
    from tests.workers import Workers

    pool = Workers(4)
    yield pool
    pool.close()
