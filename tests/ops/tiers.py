"""Instruction sets of the compiled CPU kernels, forced one by one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from timo.ops import dispatch

# The first five are levels of timo._C.isa_level; the last is a model of AMX for CPUs without it.
TIERS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
OF_ALL_OPS = TIERS[:3]  # the others are for bfloat16 products, which gyroscope_attention alone has


def available(op: str, dtype: torch.dtype) -> list[str]:
    """Tiers that this CPU has and that differ from lower ones for the op and dtype."""
    products = op == "gyroscope_attention" and dtype == torch.bfloat16
    return [tier for tier in (TIERS if products else OF_ALL_OPS) if present(tier)]


def present(tier: str) -> bool:
    compiled = dispatch.compiled()
    if compiled is None:
        return False
    return compiled.isa_level() >= (2 if tier == "amx_emulated" else TIERS.index(tier))


@contextmanager
def forced(tier: str) -> Iterator[None]:
    """Compiled kernels of this tier; the test is skipped where the CPU lacks it."""
    if not present(tier):
        pytest.skip(f"this CPU has no {tier}")
    compiled = dispatch.compiled()
    if tier == "amx_emulated":
        compiled.emulate_amx(True)
    else:
        compiled.cap_isa(TIERS.index(tier))
        assert compiled.isa_level() == TIERS.index(tier)
    try:
        yield
    finally:
        compiled.emulate_amx(False)
        compiled.cap_isa(99)
