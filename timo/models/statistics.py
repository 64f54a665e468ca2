"""Batch statistics of masked frames from their visible units alone.

The stem's first convolution has no bias and masked pixels are 0, so that its output is 0 wherever
it sees no visible unit. What is left are the outputs of visible units and a ring around each.
"""

import torch
from torch import Tensor

from timo.layers.validity import pool_valid
from timo.models.inputs import UNIT

SIDE = UNIT // 2  # outputs along a unit's side
RING = (1, 2)  # outputs before and after them that see the unit too: kernel 7, stride 2, padding 3
HALO = (5, 6)  # pixels around a unit that all of these read


def first_seen(
    visible_ids: Tensor, grid: tuple[int, int, int], valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs that see a visible unit, each in the first tile that has it.

    Args:
        visible_ids: (B, K) int64.
        grid: dates, rows and columns of units.
        valid: None, (B, T) or (B, T, H, W) bool: usable pixels of frames of whole units.

    Returns:
        (B, K, S, S) bool with S = 1 + 16 + 2, false where another tile has it, outside the frame
        and where no pixel under it is usable; and the number of usable outputs of all frames.
    """
    (B, K), (T, rows, columns), device = visible_ids.shape, grid, visible_ids.device
    height, width = rows * SIDE, columns * SIDE
    along = torch.arange(-RING[0], SIDE + RING[1], device=device)
    t, unit = visible_ids // (rows * columns), visible_ids % (rows * columns)
    row = ((unit // columns)[..., None] * SIDE + along)[..., None]  # [B, K, S, 1]
    column = ((unit % columns)[..., None] * SIDE + along)[..., None, :]  # [B, K, 1, S]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # What lies outside goes to output 0, which no tile but that of unit 0, the first, can see.
    output = torch.where(inside, (t[..., None, None] * height + row) * width + column, 0).flatten(1)
    tile = torch.arange(K, device=device).repeat_interleave(inside[0, 0].numel()).expand(B, -1)
    first = output.new_full((B, T * height * width), K).scatter_reduce(1, output, tile, "amin")
    seen = inside & (first.gather(1, output) == tile).view(inside.shape)
    if valid is None:
        return seen, torch.full((), first.numel(), device=device)
    usable = pool_valid(valid, 2)
    usable = usable if usable.ndim == 4 else usable[..., None, None]
    usable = usable.expand(B, T, height, width).flatten(1)
    return seen & usable.gather(1, output).view(inside.shape), usable.sum()
