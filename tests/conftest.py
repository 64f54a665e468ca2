"""Fixtures shared by the suite: where real data and golden vectors lie, poisoned memory."""

import os
from pathlib import Path

import pytest

from tests.guards import guarded

REPOSITORY = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / default))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set {variable} to run this test")
    return path


@pytest.fixture
def data_root() -> Path:
    """Folder of the real series, or skip."""
    return _folder("TIMO_DATA", "data")


@pytest.fixture
def golden_root() -> Path:
    """Folder of the conformance vectors, or skip."""
    return _folder("TIMO_GOLDEN", "golden")


@pytest.fixture
def poisoned():
    """Poisoned allocations between guard bands, looked at when the test ends."""
    with guarded():
        yield
