"""From pixels to tokens, and from tokens to coarser tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers.linear import linear
from timo.layers.norm import MaskedBatchNorm

# Tokens of a map up to which a product with copied windows is faster than a convolution: in units
# of 4×4 and 2×2 tokens it takes half and a fifth of the time, forward and backward, on a CPU.
SMALL = 16


class Stem(nn.Module):
    """Stage 1 embedding, stride 4 (specification: model.md §1, units.md).

    Conv 7×7/2 without bias, batch norm over valid positions, ReLU, conv 2×2/2, layer norm.

    Shape:
        x: (M, C, H, W) frames, H and W multiples of 4; or, with `halo`, (M, C, H + 5, W + 5):
            tiles that bring the 3 pixels before and 2 after which the first conv reads.
        valid: (M, H/2, W/2) bool, or broadcastable to it, or None: half-resolution positions that
            enter the statistics.
        count: see MaskedBatchNorm. With it x is (M, C, H + 11, W + 11), tiles with a ring of
            positions, 1 before and 2 after, that serve the statistics alone, and `valid` is
            (M, H/2 + 3, W/2 + 3).
        output: (M, H/4, W/4, D).
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False)
        self.bn = MaskedBatchNorm(dim)
        self.proj = nn.Conv2d(dim, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        halo: bool = False,
        count: Tensor | None = None,
    ) -> Tensor:
        # Channels last from here on, as tokens lie; the few bands are cheap to turn.
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self.conv.weight, stride=2, padding=0 if halo else 3)
        x = self.bn(x, valid, count)
        x = x if count is None else x[..., 1:-2, 1:-2]
        x = F.relu(x).permute(0, 2, 3, 1)  # [M, H/2, W/2, D]
        # Windows of the second convolution do not overlap: it is a product with 2×2 pixels.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, 4D]
        return self.norm(linear(x, weight, self.proj.bias))


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
        # An exported graph is for all sizes of its dynamic dimensions: no test binds them.
        if not torch.compiler.is_exporting() and x.shape[1] * x.shape[2] <= SMALL:
            # Not Tensor.unfold: Inductor compiles the gradient of overlapping windows on CPUs to
            # writes outside of its buffers (torch 2.13).
            h, w = x.shape[1:3]
            x = F.pad(x, (0, 0, 1, 1, 1, 1))
            windows = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
            x = torch.stack(windows, -1).flatten(3)  # [M, ceil(h/2), ceil(w/2), 9C]
            x = linear(x, self.proj.weight.flatten(1), self.proj.bias)
        else:
            x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last in memory
        return self.norm(x)
