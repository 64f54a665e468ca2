"""From pixels to tokens, and from tokens to coarser tokens."""

import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers.norm import MaskedBatchNorm


class Stem(nn.Module):
    """Stage 1 embedding, stride 4 (specification: model.md §1, units.md).

    Conv 7×7/2 without bias, batch norm over valid positions, ReLU, conv 2×2/2, layer norm.

    Shape:
        x: (M, C, H, W) frames, H and W multiples of 4; or, with `halo`, (M, C, H + 5, W + 5):
            tiles that bring the 3 pixels before and 2 after which the first conv reads.
        valid: (M, H/2, W/2) bool, or broadcastable to it, or None: half-resolution positions that
            enter the statistics.
        output: (M, H/4, W/4, D).
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False)
        self.bn = MaskedBatchNorm(dim)
        self.proj = nn.Conv2d(dim, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, valid: Tensor | None = None, halo: bool = False) -> Tensor:
        x = F.conv2d(x, self.conv.weight, stride=2, padding=0 if halo else 3)
        x = self.proj(F.relu(self.bn(x, valid)))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Embedding of stages 2 to 4, stride 2: conv 3×3/2, layer norm (specification: model.md §1).

    Shape:
        x: (M, h, w, C), maps of frames or of mask units, each padded with zeros by itself.
        output: (M, ceil(h/2), ceil(w/2), D).
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.permute(0, 3, 1, 2))  # [M, D, h/2, w/2], channels last in memory
        return self.norm(x.permute(0, 2, 3, 1))
