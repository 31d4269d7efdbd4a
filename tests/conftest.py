"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# before torch is imported anywhere: the suite's processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what a command, called in this process, would set the threads to for all tests after it
os.environ.setdefault("MEGAYOCO_THREADS", "1")


POOL = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often tests/distributed/test_kills.py kills its run")


@pytest.fixture(scope="session")
def workers(request: pytest.FixtureRequest) -> Iterator[object]:
    """Four processes for the distributed tests, started at first use."""
    from tests.workers import Workers

    pool = request.config.stash[POOL] = Workers(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module", autouse=True)
def end_idle_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """The network threads of past cases poll for as long as their process lives, at the cost of the tests after them;
    the next use starts new processes in a moment."""
    yield
    if (pool := request.config.stash.get(POOL, None)) is not None:
        pool.close()
