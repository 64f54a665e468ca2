"""Tiles of the gyroscope attention kernels: a static table, read by shape class.

tests/ahead_of_time.py holds head dimensions 32 and 64 to no spilled registers and to the limit of
shared memory. With TIMO_AOT=all it compiles every class, of which some spill.
"""

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """Launch of a spatial kernel: accumulators by dates, queries x keys, warps, stages.

    `registers` of a thread, at most; None leaves them to the compiler, which may spill some so that
    more blocks run side by side.
    """

    widths: tuple[int, ...]
    queries: int
    keys: int
    num_warps: int
    num_stages: int
    registers: int | None = None


# Kernel, head dimension above 64 -> columns of a pass (dates times padded head dimension), queries,
# keys, warps, stages and registers, of 16-bit numbers: first where all dates have the same keys,
# then with validity by position, which takes registers too, then for its second launches if theirs
# differ. "both" is the kernel of queries that adds up dk_median. With a padded head dimension in
# place of the flag: of that one.
Tiles = dict[tuple[str, bool | int], tuple[tuple[int, ...], ...]]
AMPERE: Tiles = {
    ("forward", False): ((160, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("forward", 64): ((192, 128, 16, 8, 2), (128, 128, 16, 8, 2)),
    ("forward", True): ((128, 128, 32, 8, 3), (128, 128, 32, 8, 3)),
    ("keys", False): ((320, 64, 128, 8, 2), (96, 32, 128, 8, 2)),
    ("keys", True): ((256, 64, 128, 8, 2), (128, 32, 128, 8, 2), (128, 32, 64, 8, 2)),
    ("keys", 64): ((320, 32, 128, 8, 2), (96, 32, 128, 8, 2)),
    ("queries", False): ((320, 128, 64, 8, 2), (96, 128, 32, 8, 2)),
    ("queries", 64): ((320, 128, 32, 8, 2), (96, 128, 32, 8, 2)),
    ("queries", True): ((256, 128, 64, 8, 2), (128, 128, 32, 8, 2), (128, 64, 32, 8, 2)),
    ("values", False): ((192, 32, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("values", True): ((128, 32, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("both", False): ((320, 128, 64, 8, 2), (96, 128, 32, 8, 2)),
    ("both", 64): ((320, 128, 32, 8, 2), (96, 128, 32, 8, 2)),
    ("both", True): ((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
}
HOPPER: Tiles = {
    ("forward", False): ((320, 64, 32, 4, 4), (320, 64, 32, 4, 4)),
    ("forward", 16): ((256, 64, 32, 4, 4), (256, 64, 32, 4, 4)),
    ("forward", 64): ((320, 64, 32, 4, 4), (256, 64, 32, 4, 4)),
    ("forward", True): ((256, 128, 32, 8, 3), (128, 128, 32, 8, 3)),
    ("keys", False): ((320, 32, 64, 4, 3), (160, 32, 64, 4, 3)),
    ("keys", True): ((256, 64, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("queries", False): ((320, 64, 32, 4, 3), (160, 64, 32, 4, 3)),
    ("queries", True): ((256, 128, 64, 8, 2), (128, 128, 32, 8, 2)),
    ("values", False): ((320, 32, 64, 4, 4), (320, 32, 64, 4, 3)),
    ("values", True): ((256, 32, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("both", False): ((320, 64, 32, 4, 3), (160, 64, 32, 4, 3)),
    ("both", True): ((256, 128, 64, 8, 2), (128, 128, 32, 8, 2)),
}
BLACKWELL: Tiles = AMPERE | {
    ("keys", True): ((256, 64, 128, 8, 2, 255), (128, 32, 128, 8, 2), (128, 32, 64, 8, 2)),
    ("keys", False): ((320, 64, 128, 8, 2), (64, 32, 128, 8, 2)),
    ("keys", 64): ((320, 64, 128, 8, 2), (64, 32, 128, 8, 2)),
    ("queries", False): ((320, 128, 64, 8, 2), (64, 128, 32, 8, 2)),
    ("queries", 64): ((320, 128, 64, 8, 2), (64, 128, 32, 8, 2)),
    ("queries", True): ((256, 128, 64, 8, 2, 255), (128, 128, 32, 8, 2), (128, 64, 32, 8, 2)),
}
SMALL: Tiles = {  # 99 KiB of shared memory
    ("forward", False): ((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("forward", True): ((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("keys", False): ((128, 32, 128, 8, 2), (96, 32, 128, 8, 2, 255)),
    ("keys", True): ((128, 32, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("queries", False): ((128, 128, 32, 8, 2), (96, 128, 32, 8, 2, 255)),
    ("queries", True): ((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("values", False): ((128, 32, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("values", True): ((128, 32, 128, 8, 2), (128, 32, 128, 8, 2)),
    ("both", False): ((128, 128, 32, 8, 2), (64, 128, 32, 8, 2)),
    ("both", True): ((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
}
GENERATIONS = {
    80: AMPERE, 86: SMALL, 87: AMPERE, 89: SMALL, 90: HOPPER, 100: BLACKWELL, 110: SMALL,
}  # fmt: skip
SINGLE: Tiles = {  # float32, exact products on CUDA cores, all capabilities
    ("forward", False): ((64, 32, 32, 8, 1, 255),),
    ("forward", True): ((128, 16, 32, 8, 1, 255),),
    ("keys", False): ((64, 32, 32, 8, 1, 255),),
    ("keys", True): ((128, 16, 16, 8, 1, 255),),
    ("queries", False): ((64, 32, 32, 8, 1, 255),),
    ("queries", True): ((128, 16, 16, 8, 1, 255),),
    ("values", False): ((64, 32, 32, 8, 1, 255),),
    ("values", True): ((128, 32, 32, 8, 1, 255),),
    ("both", False): ((64, 16, 16, 8, 1, 255),),
    ("both", True): ((128, 16, 16, 8, 1, 255),),
}


def padded(head_dim: int) -> int:
    """Head dimension as the matrix products see it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def widths(dates: int, columns: int, head_dim: int, widest: int) -> tuple[int, ...]:
    """Dates of one pass, as matrices of at most `widest` columns.

    All passes get about the same number of dates; the last may have fewer.
    """
    passes = -(-dates // max(1, columns // padded(head_dim)))
    dates = -(-dates // passes)
    widest = max(1, widest // padded(head_dim))
    out = []
    while dates:
        while widest > dates:
            widest //= 2
        out.append(widest)
        dates -= widest
    return tuple(out)


def tile(
    kernel: str, dates: int, head_dim: int, dtype: torch.dtype, launch: int, capability: int
) -> Tile:
    """Tile of the spatial kernel "forward", "keys", "queries", "values" or "both".

    `launch` is 0 where all dates have the same keys, 1 with validity by position, 2 for the second
    launch of that.
    """
    table = GENERATIONS[max(c for c in GENERATIONS if c <= capability)]
    table = SINGLE if dtype == torch.float32 else table
    entries = table.get((kernel, padded(head_dim)), table[kernel, head_dim > 64])
    columns, *rest = entries[min(launch, len(entries) - 1)]
    widest = 64
    if table is HOPPER:
        # `wgmma` takes 256; of sums, and beside sums in memory, more than 128 spill.
        widest = 256 if kernel in ("keys", "queries") else 128
    return Tile(widths(dates, columns, head_dim, widest), *rest)


def held(dtype: torch.dtype, capability: int) -> bool:
    """Whether rows that meet all columns wait in registers, from where `wgmma` may take them."""
    return dtype.itemsize == 2 and 90 <= capability < 100


def first_keys(tile: Tile, dtype: torch.dtype) -> int:
    """Keys at a time where forward looks for the greatest energy and holds no sums yet."""
    return max(64, tile.keys) if dtype.itemsize == 2 else tile.keys


def temporal_tile(dates: int, head_dim: int, dtype: torch.dtype, values: int) -> dict[str, int]:
    """Positions x query dates x padded head dimension, key dates at a time, and 128 threads.

    At most `values` 16-bit numbers, half as many of 32 bits, and half of either at head dimensions
    above 64, and for one date, whose keys are as many numbers as its queries. Tensor cores want 16
    dates, most of them real, and would round float32. ONCE all key dates fit, and sums need no
    second scale; more than 16 of them in forward alone, whose `values` leave room.
    """
    products = dtype.itemsize == 2 and dates > 6
    DP = padded(head_dim) if products else triton.next_power_of_2(head_dim)
    TQ = 16 if products else min(16, triton.next_power_of_2(dates))
    values = values * 2 // dtype.itemsize // (2 if head_dim > 64 else 1)
    TK, stages = (16, 1) if products else (1, 3)
    if products and values >= 4096 and 16 < dates <= 64:
        TK, values = triton.next_power_of_2(dates), values // 2
    BP = max(1, values // (max(2, TQ) * DP))
    sizes = {"DP": DP, "TQ": TQ, "TK": TK, "BP": BP, "ONCE": products and dates <= TK}
    return sizes | {"num_warps": 4, "num_stages": stages}
