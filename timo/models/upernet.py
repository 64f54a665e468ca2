"""UPerNet head for segmentation (Xiao et al., 2018; specification: model.md §4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers import MaskedBatchNorm
from timo.layers.linear import linear
from timo.models.weights import initialise

POOL_SIZES = (1, 2, 3, 6)


class ConvNormReLU(nn.Module):
    """Conv with bias, batch norm over valid positions, ReLU: (M, C, h, w) -> (M, D, h, w).

    With `PyramidConv2d` as `conv` it takes what that takes.
    """

    def __init__(self, in_dim: int, dim: int, kernel: int, conv: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        self.conv = conv(in_dim, dim, kernel, padding=kernel // 2)
        self.bn = MaskedBatchNorm(dim)

    def forward(self, x: Tensor | Sequence[Tensor], valid: Tensor | None) -> Tensor:
        return F.relu(self.bn(self.conv(x), valid))


class PyramidConv2d(nn.Conv2d):
    """A 3×3 convolution of maps enlarged to the finest and put side by side, without doing either.

    As `F.conv2d(torch.cat([resize(x, maps[0]) for x in maps], 1), weight, bias, padding=1)`, with a
    few more roundings. Sums over channels commute with the enlargement, so that each map's are made
    at its own size, for every tap of the kernel, and what is enlarged, shifted by the tap and added
    up are those: with four maps, each half as fine, about a third of the products. The enlargement
    is a product too, which grows with the side of the maps: of 256 channels it adds 0.04 to that
    share for a finest map of 56×56, 0.16 for one of 256×256.

    Shape:
        maps: two or more (M, C_i, h_i, w_i), finest first, Σ C_i the channels of the convolution;
            in the floating dtype of the weight, or as autocast has it.
        output: (M, D, h_1, w_1).
    """

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        finest, *coarse = maps
        H, W = finest.shape[2:]
        own, *others = self.weight.split([x.shape[1] for x in maps], 1)
        down, across = [], []
        for x, weight in zip(coarse, others):
            h, w = x.shape[2:]
            x = x.permute(0, 2, 3, 1).contiguous()  # [M, h, w, C], once for three products
            right = enlargement(w, W, x).permute(1, 2, 0).flatten(1)  # [W, w·3]
            for row in weight.permute(2, 3, 0, 1):  # [3, D, C], of the kernel
                sums = linear(x, row.flatten(0, 1), None).unflatten(3, (3, -1))  # [M, h, w, 3, D]
                across.append(right @ sums.flatten(2, 3))  # [M, h, W, D]
            down.append(enlargement(h, H, x).transpose(0, 1).flatten(1))  # [H, 3·h]
        # One product over maps, rows of the kernel and rows of the maps rounds once.
        out = torch.cat(down, 1) @ torch.cat(across, 1).flatten(2)  # [M, H, W·D]
        out = out.unflatten(2, (W, -1)).permute(0, 3, 1, 2)
        return out + F.conv2d(finest, own, self.bias, padding=1)


def enlargement(size: int, target: int, like: Tensor) -> Tensor:
    """Matrices (3, target, size) that enlarge a line as `resize` and shift it by -1, 0 or 1.

    What is shifted in is 0: the padding of a convolution by a kernel of three.
    """
    points = torch.eye(size, dtype=like.dtype, device=like.device)[None]
    lines = F.interpolate(points, target, mode="linear", align_corners=False)[0].T  # [target, size]
    lines = F.pad(lines, (0, 0, 1, 1))
    return torch.stack([lines[i : i + target] for i in range(3)])


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
        self.fuse = ConvNormReLU(len(in_dims) * dim, dim, 3, PyramidConv2d)
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
        return self.fuse(levels, valids[0])


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
