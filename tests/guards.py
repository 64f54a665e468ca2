"""Allocations that show what a kernel forgot to write, and what it should not have written."""

from contextlib import contextmanager
from math import prod
from unittest.mock import patch

import torch
from torch import Tensor

from timo.ops import dispatch

GUARD = 256  # bytes on each side, so that the alignment of what lies between stays
LARGEST = 2**28  # bytes; beyond it lies memory that tests of offsets touch here and there


@contextmanager
def guarded():
    """Poison what backends allocate uninitialised; at the end look at the bands around it.

    Covers `torch.empty`, `torch.empty_like` and `Tensor.new_empty` called from Python, and the
    workspaces of compiled kernels. Floats start as NaN, integers as a wild number.

    Raises:
        AssertionError: a byte beside an allocation was written to.
    """
    empty, blocks = torch.empty, []

    def allocate(size, dtype, device):
        bytes_ = prod(size) * dtype.itemsize
        if bytes_ > LARGEST or torch.device(device or "cpu").type == "meta":
            return empty(size, dtype=dtype, device=device)
        # All bits set is a NaN in every floating dtype, and not the NaN that arithmetic gives.
        fill = 0xFF if dtype.is_floating_point else 1 if dtype == torch.bool else 0xB3
        whole = torch.full((bytes_ + 2 * GUARD,), fill, dtype=torch.uint8, device=device)
        blocks.append((whole, fill, f"{dtype} {tuple(size)}"))
        return whole[GUARD : GUARD + bytes_].view(dtype).view(size)

    def sizes(size):
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size

    def poisoned_empty(*size, dtype=None, device=None):
        return allocate(sizes(size), dtype or torch.get_default_dtype(), device)

    def poisoned_empty_like(x, *, dtype=None, device=None):
        return allocate(x.shape, dtype or x.dtype, device or x.device)

    def poisoned_new_empty(x, *size, dtype=None, device=None):
        return allocate(sizes(size), dtype or x.dtype, device or x.device)

    with (
        patch.object(torch, "empty", poisoned_empty),
        patch.object(torch, "empty_like", poisoned_empty_like),
        patch.object(Tensor, "new_empty", poisoned_new_empty),
        poisoned_workspace(),
    ):
        yield
    for whole, fill, what in blocks:
        for band in (whole[:GUARD], whole[-GUARD:]):
            assert (band == fill).all(), f"a kernel wrote outside its output {what}"


@contextmanager
def poisoned_workspace():
    """NaN in the workspaces of compiled kernels."""
    compiled = dispatch.compiled()
    if compiled:
        compiled.poison_workspace(True)
    try:
        yield
    finally:
        if compiled:
            compiled.poison_workspace(False)
