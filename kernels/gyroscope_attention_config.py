"""Tiles of the gyroscope attention kernels: a static table, read by shape class.

Every entry compiles without spilling registers and fits in shared memory (tests/ahead_of_time.py
holds them to it).
"""

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """Launch of a spatial kernel: accumulators by dates, queries x keys, warps, stages."""

    widths: tuple[int, ...]
    queries: int
    keys: int
    num_warps: int
    num_stages: int


# (kernel, kind of number) -> capability -> columns of accumulators a pass holds (dates * padded
# head dimension), queries, keys, warps, stages; the first line of the greatest capability that is
# not above the device's and whose head dimension is not below the shape's.
def padded(head_dim: int) -> int:
    """Head dimension as the matrix products see it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def widths(dates: int, columns: int, head_dim: int) -> tuple[int, ...]:
    """Dates of one pass, as accumulators of 64 columns: wider ones spill in the epilogue.

    All passes get about the same number of dates; the last may have fewer.
    """
    passes = -(-dates // max(1, columns // padded(head_dim)))
    dates = -(-dates // passes)
    widest = max(1, 64 // padded(head_dim))
    out = []
    while dates:
        while widest > dates:
            widest //= 2
        out.append(widest)
        dates -= widest
    return tuple(out)


def forward_tile(dates: int, head_dim: int, dtype: torch.dtype, kind: int, capability: int) -> Tile:
    if dtype == torch.float32:
        return Tile(widths(dates, 128, head_dim), 64, 32, 4, 1)
    return Tile(widths(dates, 320, head_dim), 128, 64, 8, 3)


def temporal_tile(dates: int, head_dim: int, values: int) -> dict[str, int]:
    """Positions x query dates x padded head dimension = `values`, 128 threads."""
    DP = triton.next_power_of_2(head_dim)
    TQ = min(16, triton.next_power_of_2(dates))
    return {"DP": DP, "TQ": TQ, "BP": max(1, values // (TQ * DP)), "num_warps": 4}


def key_tile(dates: int, head_dim: int, dtype: torch.dtype, kind: int, capability: int) -> Tile:
    if dtype == torch.float32:
        return Tile(widths(dates, 64, head_dim), 32, 64, 4, 1)
    return Tile(widths(dates, 256, head_dim), 32, 128, 8, 2)


def query_tile(dates: int, head_dim: int, dtype: torch.dtype, kind: int, capability: int) -> Tile:
    if dtype == torch.float32:
        return Tile(widths(dates, 64, head_dim), 64, 32, 4, 1)
    return Tile(widths(dates, 256, head_dim), 128, 64, 8, 2)
