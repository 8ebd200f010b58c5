"""Where coordinators keep things, and fixtures for tests that need a whole federation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests import backends
from tests.federation import Federation

HERE = Path(__file__).parent
LONG = ("crash", "e2e", "demo", "simulation", "benchmarks", "attacks", "coordinator", "client")
"""Folders of tests that start processes, the longest first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that choose what coordinators run on."""
    backends.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read them."""
    backends.configure(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: one that begins last leaves the other cores idle."""
    folders = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: folders.get(item.path.relative_to(HERE).parts[0], len(LONG)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of every collection: Flower's own code asks for many."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """End the servers that tests were served by."""
    backends.chosen.close()


@pytest.fixture(autouse=True, scope="module")
def _databases_of_a_module() -> Iterator[None]:
    with backends.chosen.scope():
        yield


@pytest.fixture(autouse=True)
def _databases_of_a_test() -> Iterator[None]:
    with backends.chosen.scope():
        yield


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Simulations set up the log of their process, which here is that of all tests."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """A coordinator that is initialized, not yet serving; everything is ended afterwards."""
    made = Federation.make(tmp_path)
    yield made
    made.close()
