"""Joint and gyroscope attention over the tokens of a series."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo import ops
from timo.layers.linear import Linear
from timo.layers.norm import MaskedBatchNorm
from timo.ops import dispatch
from timo.ops.checks import check_tensor, check_valid


class JointAttention(nn.Module):
    """Softmax attention of every token to every valid token of its series.

    Source: model.md §1; energies are scaled by head_dim^-0.5.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: heads.
        qkv_bias: whether the query, key and value projections have a bias.

    Shape:
        x: (B, T·N, dim), date-major.
        valid: (B, T) or (B, T, N) bool, true where usable; all usable if None.
        output: (B, T·N, dim). Queries of a series without a valid token get finite values that
            mean nothing.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}; it must be a multiple of num_heads = {num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"

    def forward(self, x: Tensor, num_dates: int, valid: Tensor | None = None) -> Tensor:
        grid = self._check(x, num_dates, valid)
        heads = (self.num_heads, -1)
        q = self.q(x).unflatten(-1, heads)  # [B, L, H, D]
        k, v = self.kv(x).unflatten(-1, (2, *heads)).unbind(2)  # views
        if valid is not None:
            valid = (valid if valid.ndim == 3 else valid[:, :, None]).expand(grid).flatten(1)
        attend = _attend_compiled if fast_attention(q.device.type, q.dtype) else _attend
        return self.proj(attend(q, k, v, valid).flatten(2))

    def _check(self, x: Tensor, num_dates: int, valid: Tensor | None) -> tuple[int, int, int]:
        """Raise unless the arguments fit; else (B, T, N)."""
        check_tensor("x", x, "(B, T·N, dim)")
        if x.shape[2] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; its last dimension must be dim = {self.dim}"
            )
        if num_dates < 1 or x.shape[1] % num_dates:
            raise ValueError(
                f"num_dates is {num_dates}; it must divide the {x.shape[1]} tokens of x, "
                "which are date-major"
            )
        grid = (x.shape[0], num_dates, x.shape[1] // num_dates)
        check_valid(valid, {"(B, T)": grid[:2], "(B, T, N)": grid}, x)
        return grid


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Joint attention by PyTorch: (B, L, H, D) each, valid (B, L) -> (B, L, H, D)."""
    if valid is not None:
        # A softmax over no key at all is 0/0: such a series attends to everything instead, and
        # its tokens, all invalid, are zeroed by the caller.
        valid = (valid | ~valid.any(1, keepdim=True))[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(1, 2)


def _attend_compiled(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """The same as gyroscope attention over a single date without a gate; 0 at invalid queries."""
    gate = torch.zeros(q.shape[:3], device=q.device)
    q_date, k_date, v = q.detach()[:, None], k.detach()[:, None], v[:, None]  # no other date
    valid = None if valid is None else valid[:, None]
    scale = q.shape[-1] ** -0.5
    out = ops.gyroscope_attention(q_date, k_date, v, q, k, gate[:, None], valid, scale)
    return out.squeeze(1)


@dispatch.assume_constant_result
def fast_attention(device: str, dtype: torch.dtype) -> bool:
    """Whether `_attend_compiled` runs and is the faster one: on CPUs with AVX-512 or AVX2.

    Of the time of `scaled_dot_product_attention`, forward and backward in float32 together take
    0.38 to 0.45 with AVX-512 and 0.65 to 0.75 with AVX2, for 144 to 2,304 tokens.
    """
    if device != "cpu" or torch.compiler.is_exporting():
        return False  # an exported graph may run elsewhere
    request = dispatch.Request(torch.device(device), dtype)
    choice = dispatch.OPS["gyroscope_attention"].choose(request)
    return choice.backend == dispatch.CPP and dispatch.compiled().isa_level() > 0


class GyroscopeAttention(JointAttention):
    """Spatiotemporal gyroscope attention, factored (specification: gyroscope.md).

    Every token attends to its own position at the other dates, and to every position of its own
    date through energies of the temporal medians, raised by a gate. Energies are not scaled.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: heads.
        qkv_bias: whether the query, key and value projections have a bias.

    Shape:
        x: (B, T·N, dim), date-major.
        valid: (B, T) or (B, T, N) bool, true where usable; all usable if None.
        output: (B, T·N, dim); at invalid tokens the bias of the output projection.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__(dim, num_heads, qkv_bias)
        self.gate = nn.Linear(dim // num_heads, 1, bias=False)  # shared by the heads
        self.gate_norm = MaskedBatchNorm(1)

    def forward(self, x: Tensor, num_dates: int, valid: Tensor | None = None) -> Tensor:
        grid = self._check(x, num_dates, valid)
        dates, heads = (num_dates, -1), (self.num_heads, -1)
        q = self.q(x).unflatten(2, heads).unflatten(1, dates)  # [B, T, N, H, D]
        k, v = self.kv(x).unflatten(2, (2, *heads)).unflatten(1, dates).unbind(3)  # strided views
        q_median, _, gate = ops.median_deviation(q, self.gate.weight[0], valid)
        k_median = ops.temporal_median(k, valid)[0]  # [B, N, H, D]
        # Float32 under autocast, the module's own dtype where all of it is half. One row of one
        # channel: PyTorch normalises many rows of one number each at a hundredth of the speed.
        gate = gate.to(self.gate.weight.dtype).view(1, 1, -1)
        gate = torch.relu(self.gate_norm(gate, self._entries(valid, q)))
        gate = gate.view(*grid, self.num_heads)
        out = ops.gyroscope_attention(q, k, v, q_median, k_median, gate, valid)
        return self.proj(out.flatten(3).flatten(1, 2))

    @staticmethod
    def _entries(valid: Tensor | None, q: Tensor) -> Tensor | None:
        """Validity of every entry of the gate, (1, B·T·N·H)."""
        if valid is None:
            return None
        valid = valid[..., None] if valid.ndim == 3 else valid[:, :, None, None]
        return valid.expand(q.shape[:4]).reshape(1, -1)
