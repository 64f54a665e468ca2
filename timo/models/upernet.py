"""UPerNet head for segmentation (Xiao et al., 2018; specification: model.md §4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers import MaskedBatchNorm
from timo.models.weights import initialise

POOL_SIZES = (1, 2, 3, 6)


class ConvNormReLU(nn.Module):
    """Conv with bias, batch norm over valid positions, ReLU: (M, C, h, w) -> (M, D, h, w)."""

    def __init__(self, in_dim: int, dim: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2)
        self.bn = MaskedBatchNorm(dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return F.relu(self.bn(self.conv(x), valid))


class UPerNet(nn.Module):
    """Fuse a pyramid of maps into one at the finest resolution.

    Args:
        in_dims: channels of the four maps, finest first.
        dim: channels within and of the output.

    Shape:
        maps: four (M, C_i, h_i, w_i), finest first, 0 at invalid positions.
        valids: for each None, or (M, h_i, w_i) bool or broadcastable to it: positions that enter
            pooling and batch statistics.
        output: (M, dim, h_1, w_1).
    """

    def __init__(self, in_dims: Sequence[int], dim: int):
        super().__init__()
        *finer, last = in_dims
        self.pyramid = nn.ModuleList(ConvNormReLU(last, dim, 1) for _ in POOL_SIZES)
        self.bottleneck = ConvNormReLU(last + len(POOL_SIZES) * dim, dim, 3)
        self.laterals = nn.ModuleList(ConvNormReLU(d, dim, 1) for d in finer)
        self.smooth = nn.ModuleList(ConvNormReLU(dim, dim, 3) for _ in finer)
        self.fuse = ConvNormReLU(len(in_dims) * dim, dim, 3)
        self.apply(initialise)

    def forward(self, maps: Sequence[Tensor], valids: Sequence[Tensor | None]) -> Tensor:
        *finer, last = maps
        context = [last]
        for size, conv in zip(POOL_SIZES, self.pyramid):
            pooled, usable = pool(last, valids[-1], size)
            context.append(resize(conv(pooled, usable), last))
        levels = [conv(x, v) for conv, x, v in zip(self.laterals, finer, valids)]
        levels.append(self.bottleneck(torch.cat(context, 1), valids[-1]))
        for i in range(len(finer), 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1])
        for i, conv in enumerate(self.smooth):
            levels[i] = conv(levels[i], valids[i])
        return self.fuse(torch.cat([resize(x, levels[0]) for x in levels], 1), valids[0])


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear interpolation of (M, C, h, w) to the size of `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def pool(x: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """Mean over the valid positions of size×size cells, 0 where a cell has none.

    Returns:
        (M, C, size, size) and the validity of the cells, (M, size, size) or None.
    """
    pooled = F.adaptive_avg_pool2d(x, size)
    if valid is None:
        return pooled, None
    share = valid.expand(x.shape[0], *x.shape[2:]).unsqueeze(1).to(x.dtype)
    share = F.adaptive_avg_pool2d(share, size)  # [M, 1, size, size]
    usable = share > 0
    return torch.where(usable, pooled / share, 0), usable.squeeze(1)
