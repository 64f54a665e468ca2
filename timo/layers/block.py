"""The transformer block and its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers.attention import GyroscopeAttention, JointAttention
from timo.layers.linear import Linear

ATTENTION = {"gyroscope": GyroscopeAttention, "joint": JointAttention}


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a sample's branch with probability `rate`.

    What is kept is divided by 1 − rate. Shape: (B, ...) -> (B, ...).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}; it must be at least 0 and less than 1")
        self.rate = rate

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1 - self.rate))


class Block(nn.Module):
    """Pre-norm block: `x += attn(LN(x))`, `x += mlp(LN(x))` (specification: model.md §1).

    Args:
        dim: channels.
        num_heads: attention heads.
        attention: "gyroscope" or "joint".
        drop_path: probability of dropping a branch in training.
        layer_scale: initial value of a learned factor per channel on both branches; None for none.

    Shape:
        x: (B, T·N, dim), date-major; valid: (B, T) or (B, T, N) bool or None; output: as x.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: str = "joint",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention is {attention!r}; it must be {' or '.join(ATTENTION)}")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ATTENTION[attention](dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.scale2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, num_dates: int, valid: Tensor | None = None) -> Tensor:
        x = x + self._branch(self.attn(self.norm1(x), num_dates, valid), self.scale1)
        return x + self._branch(self.mlp(self.norm2(x)), self.scale2)

    def _branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return self.drop_path(x if scale is None else x * scale)
