"""Fixtures shared by the suite: where real data and golden vectors lie, poisoned memory."""

import os
from pathlib import Path

import pytest
import torch

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
def poisoned(monkeypatch):
    """Fill what `torch.empty` returns with NaN (or a wild number) between guard bands.

    Kernels allocate outputs with `torch.empty`: an element they forget stays NaN, and a write
    beyond the end is found when the test ends.
    """
    real, guard, blocks = torch.empty, 64, []

    def empty(*size, dtype=None, device=None, **kwargs):
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.get_default_dtype()
        count = 1
        for n in size:
            count *= n
        whole = real(count + 2 * guard, dtype=dtype, device=device, **kwargs)
        whole.fill_(float("nan") if dtype.is_floating_point else -77)
        blocks.append(whole)
        return whole[guard : guard + count].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for whole in blocks:
        for band in (whole[:guard], whole[-guard:]):
            untouched = band.isnan() if band.dtype.is_floating_point else band == -77
            assert untouched.all(), "a kernel wrote outside its output"
