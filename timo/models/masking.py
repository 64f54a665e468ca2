"""Which mask units stay visible in pretraining, drawn on the device from the samples' keys.

The generator is counter-based: a word is a hash of (key, purpose, index), so that the order in
which units are kept depends on the sample alone, not on the device, the batch or the number of
processes. How many are kept is the same for a whole batch: where validity differs between samples,
it depends on the others of the batch. Words of 32 bits lie in int64 and no product reaches 2^63, so
every device computes the same bits.
"""

import math

import torch
from torch import Tensor

from timo.layers.validity import pool_valid
from timo.models.inputs import UNIT, pad_valid

LOW = 0xFFFFFFFF
# What words are drawn for; each purpose has its own 2^26 indices.
OF_UNIT, OF_DATE, OF_PLACE, OF_BLOCK, OF_ROW, OF_COLUMN, OF_CHOICE = range(7)


def draw_units(
    key: Tensor,
    grid: tuple[int, int, int],
    keep: int,
    strategy: str = "random",
    usable: Tensor | None = None,
) -> Tensor:
    """Draw the units that stay visible, without waiting for the device.

    Every strategy puts the units of a sample in an order and keeps the first usable ones:

    - "random": any order (published).
    - "date": date by date, so that whole acquisitions are hidden; one may be hidden in part.
    - "location": place by place, so that a place is seen at all dates or hidden at all dates; one
      may be hidden in part.
    - "block": rectangles half as high and wide as the frame, cut at its border, are hidden one
      after another, each in one frame, until enough are; the last is hidden in part.
    - "mixture": one of these for each sample, alike likely.

    Args:
        key: (B,) int64, not negative; the same key gives the same units on any device.
        grid: dates T, rows and columns of units.
        keep: K, units to keep; see `visible_count`. At most the usable units of every sample.
        strategy: one of `STRATEGIES`.
        usable: (B, units) bool, others are never drawn; all usable if None.

    Returns:
        (B, K) int64, ascending; unit (t, i, j) is `t·rows·columns + i·columns + j`.

    Raises:
        ValueError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"masking is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
    if strategy == "mixture":
        scores = torch.stack([score(key, grid) for score in SCORES.values()])
        chosen = words(key, OF_CHOICE, 1) % len(scores)  # [B, 1]
        score = scores.gather(0, chosen.expand_as(scores[0])[None])[0]
    else:
        score = SCORES[strategy](key, grid)
    if usable is not None:
        score = score | ((~usable).long() << 62)  # behind every usable unit
    return score.argsort(stable=True, dim=1)[:, :keep].sort(1).values


def visible_count(units: int, mask_ratio: float) -> int:
    """K = floor(units · (1 − mask_ratio)), at least 1, at most one less than `units`.

    Args:
        units: the least number of usable units of any sample of the batch, see `least_usable`.
        mask_ratio: share of units to hide, between 0 and 1.

    Raises:
        ValueError: the ratio is out of range.
    """
    if not isinstance(mask_ratio, int | float) or not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio!r}; it must be a number between 0 and 1")
    return max(1, min(math.floor(units * (1 - mask_ratio) + 1e-9), units - 1))


def unit_grid(frames: Tensor) -> tuple[int, int, int]:
    """Dates, rows and columns of units of (B, T, C, H, W) frames; the last ones may be cut."""
    T, H, W = frames.shape[1], *frames.shape[3:]
    return T, -(-H // UNIT), -(-W // UNIT)


def usable_units(frames: Tensor, valid: Tensor | None) -> Tensor | None:
    """Which units have a valid pixel.

    Args:
        frames: (B, T, C, H, W).
        valid: (B, T) or (B, T, H, W) bool, or None: all usable.

    Returns:
        (B, units) bool, or None where all are.
    """
    if valid is None:  # where frames are padded, every unit still has a pixel
        return None
    valid = pad_valid(valid, frames)
    if valid.ndim == 2:
        _, rows, columns = unit_grid(frames)
        return valid[..., None].expand(-1, -1, rows * columns).flatten(1)
    return pool_valid(valid, UNIT).flatten(1)


def least_usable(frames: Tensor, usable: Tensor | None) -> int:
    """The least number of usable units of any sample; waits for the device of `usable`."""
    return math.prod(unit_grid(frames)) if usable is None else int(usable.sum(1).min())


def words(key: Tensor, purpose: int, count: int) -> Tensor:
    """Uniform 32-bit words in int64, (B,) -> (B, count), that (key, purpose, index) determine."""
    state = mix(mix(key >> 32) ^ (key & LOW))
    index = torch.arange(count, device=key.device) + (purpose << 26)
    return mix(state[:, None] ^ mix(index))


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose output bits all depend on all input bits.

    Source: C. Wellons, hash-prospector, the two-round function of least bias.
    """
    x = (x - 0x61C88647) & LOW  # 0 is no fixed point; a constant of 32 bits, for compilers
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & LOW
    return x ^ (x >> 15)


def _random(key: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Scores of less than 2^62, (B, units): units of low score stay visible."""
    return words(key, OF_UNIT, math.prod(grid)) << 30


def _date(key: Tensor, grid: tuple[int, int, int]) -> Tensor:
    T, rows, columns = grid
    date = words(key, OF_DATE, T).repeat_interleave(rows * columns, 1)
    return (date << 30) | (words(key, OF_UNIT, T * rows * columns) >> 2)


def _location(key: Tensor, grid: tuple[int, int, int]) -> Tensor:
    T, rows, columns = grid
    place = words(key, OF_PLACE, rows * columns).repeat(1, T)
    return (place << 30) | (words(key, OF_UNIT, T * rows * columns) >> 2)


def _block(key: Tensor, grid: tuple[int, int, int]) -> Tensor:
    T, rows, columns = grid
    height, width = -(-rows // 2), -(-columns // 2)
    # Corners reach beyond the frame, which makes every place equally likely to be covered. With
    # this many blocks to a frame, a quarter of a unit of each remains uncovered.
    corners = rows + height - 1, columns + width - 1
    missed = 1 - height * width / math.prod(corners)
    count = math.ceil(-math.log(4 * rows * columns) / math.log(missed)) if missed else 1
    order, row, column = (
        words(key, purpose, T * count).view(-1, T, count, 1)
        for purpose in (OF_BLOCK, OF_ROW, OF_COLUMN)
    )
    row, column = row % corners[0] - height + 1, column % corners[1] - width + 1
    i, j = (torch.arange(n, device=key.device) for n in (rows, columns))
    down = (i >= row) & (i < row + height)  # [B, T, count, rows]
    across = (j >= column) & (j < column + width)  # [B, T, count, columns]
    covered = down[..., None] & across[..., None, :]
    first = torch.where(covered, order[..., None], LOW).amin(2).flatten(1)
    return ((LOW - first) << 30) | (words(key, OF_UNIT, T * rows * columns) >> 2)


SCORES = {"random": _random, "date": _date, "location": _location, "block": _block}
STRATEGIES = (*SCORES, "mixture")
