"""Sine-cosine positional codes of dates, rows and columns (specification: model.md §1).

Codes come from 1-D tables of T, h and w rows, computed in float64 and rounded before they are
spread out: 0.1 ms for a decoder of 147 tokens, so that there is no cache to go stale. The tables
come from an op of their own: a compiler that saw through it would compute every token's sines anew.
"""

import torch
from torch import Tensor

from timo.ops.library import define

DAYS_PER_MONTH = 30.4375


def sincos(position: Tensor, dim: int) -> Tensor:
    """1-D code of `position`: (...,) -> (..., dim) float64, `[sin(p·ω_i) …, cos(p·ω_i) …]`.

    ω_i = 10000^(−i/(dim/2)) for i = 0 … dim/2 − 1; `dim` is even. Not differentiable.
    """
    return torch.ops.timo.sincos(position, dim)


def _sincos(position: Tensor, dim: int) -> Tensor:
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = position.double()[..., None] * 10000.0**-exponent
    return torch.cat([angle.sin(), angle.cos()], -1)


def _fake_sincos(position: Tensor, dim: int) -> Tensor:
    return position.new_empty((*position.shape, dim), dtype=torch.float64)


define("sincos(Tensor position, SymInt dim) -> Tensor", _sincos, _fake_sincos)


def months_since_first(dates: Tensor, valid: Tensor | None) -> Tensor:
    """Months from the earliest valid date of each series.

    Args:
        dates: (B, T) integer days, in any order.
        valid: None, (B, T) or (B, T, H, W) bool. A series without a valid date counts from its
            earliest one.

    Returns:
        (B, T) float64 months of 30.4375 days.
    """
    usable = torch.ones_like(dates, dtype=torch.bool) if valid is None else valid
    usable = usable.flatten(2).any(2) if usable.ndim == 4 else usable
    usable = usable | ~usable.any(1, keepdim=True)
    last = torch.iinfo(dates.dtype).max
    first = dates.masked_fill(~usable, last).amin(1, keepdim=True)
    return (dates - first).double() / DAYS_PER_MONTH


def grid_code(
    time: Tensor, height: int, width: int, dim: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Code of every token of a grid.

    Args:
        time: (T,) or (B, T) temporal positions.
        dim: channels D, a multiple of 8: D/2 for time, D/4 for the column, D/4 for the row.
        dtype: of the code.

    Returns:
        (T, h, w, D) or (B, T, h, w, D).
    """
    shape = (*time.shape, height, width)
    date = sincos(time, dim // 2).to(dtype)[..., None, None, :]  # [..., T, 1, 1, D/2]
    along = torch.arange(max(height, width), device=time.device)
    table = sincos(along, dim // 4).to(dtype)
    column, row = table[:width], table[:height, None]  # [w, D/4], [h, 1, D/4]
    return torch.cat([part.expand(*shape, -1) for part in (date, column, row)], -1)


def unit_code(
    time: Tensor,
    unit_ids: Tensor,
    grid: tuple[int, int],
    side: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Code of the tokens of some mask units: `grid_code` of the full frame, read at them.

    Args:
        time: (T,) or (B, T) temporal positions.
        unit_ids: (B, K) int64, `t·rows·columns + i·columns + j` (specification: units.md).
        grid: rows and columns of units in a frame.
        side: tokens along a unit's side.
        dim, dtype: see `grid_code`.

    Returns:
        (B, K, side, side, D).
    """
    rows, columns = grid
    shape = (*unit_ids.shape, side, side)
    t = unit_ids // (rows * columns)
    i, j = unit_ids // columns % rows, unit_ids % columns
    date = sincos(time, dim // 2).to(dtype).expand(len(unit_ids), -1, -1)  # [B, T, D/2]
    date = date.gather(1, t[..., None].expand(-1, -1, dim // 2))  # [B, K, D/2]
    along = torch.arange(max(grid) * side, device=time.device)
    table = sincos(along, dim // 4).to(dtype).unflatten(0, (-1, side))  # [units, side, D/4]
    column = table[j][:, :, None]  # [B, K, 1, side, D/4]
    row = table[i][:, :, :, None]  # [B, K, side, 1, D/4]
    parts = (date[:, :, None, None], column, row)
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)
