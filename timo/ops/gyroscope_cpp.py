"""Launch of the compiled CPU kernels of gyroscope attention: views in, allocated results out.

The kernels take any strides but for the channels, which must lie side by side, and channels in
multiples of 8; other inputs are copied. Products of bfloat16 are those of AMX tiles or, on AMD's
CPUs, of AVX512-BF16; factors that are formed inside, weights, their gradients and weighted
cotangents, are then rounded to bfloat16. Other products, and all sums, are float32. Results do not
depend on the number of threads. The workspace stays below 64 MB as long as 4 N (D + 2T) bytes, what
the backward holds of one head, are below 28 MB: up to N = 140,000 for D = 32 and T = 10.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from timo.ops import dispatch
from timo.ops.compiled import launch


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and spatial_lse as the reference gives them."""
    B, T, N, H, D = q.shape
    inputs = [*map(_dense, (q, k, v, q_median, k_median)), gate]
    out = torch.empty(inputs[0].shape, dtype=q.dtype)
    lse = torch.empty((B, T, N, H), dtype=torch.float32)
    spatial_lse = torch.empty((B, N, H), dtype=torch.float32)
    views = [*_views(*inputs), _dated(out), _dated(lse), _dateless(spatial_lse)]
    launch("gyroscope_attention", q.device, views, *_sizes(inputs[0], gate, valid, scale))
    return out[..., :D].contiguous(), lse, spatial_lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    spatial_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, q_median, k_median and gate."""
    D = q.shape[-1]
    inputs = [*map(_dense, (q, k, v, q_median, k_median)), gate]
    grad, out = _dense(grad), _dense(out)
    results = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    views = [*_views(*inputs), _dated(out), _dated(lse), _dateless(spatial_lse)]
    views += [_dated(grad), *_views(*results)]
    sizes = _sizes(inputs[0], gate, valid, scale)
    launch("gyroscope_attention_backward", q.device, views, *sizes)
    return *(x[..., :D].contiguous() for x in results[:5]), results[5]


def _dense(x: Tensor) -> Tensor:
    """Channels side by side, and zeros after them up to a multiple of 8."""
    if x.shape[-1] % 8:
        x = pad(x, (0, -x.shape[-1] % 8))  # may keep its format, as channels last
    return x if x.stride(-1) == 1 else x.contiguous()


def _views(q, k, v, q_median, k_median, gate) -> list[tuple[int, list[int]]]:
    return [*map(_dated, (q, k, v)), *map(_dateless, (q_median, k_median)), _dated(gate)]


def _dated(x: Tensor) -> tuple[int, list[int]]:
    """Address and strides of (B, T, N, H) or (B, T, N, H, D)."""
    return x.data_ptr(), list(x.stride()[:4])


def _dateless(x: Tensor) -> tuple[int, list[int]]:
    """The same of (B, N, H) or (B, N, H, D)."""
    sample, position, head = x.stride()[:3]
    return x.data_ptr(), [sample, 0, position, head]


def _sizes(q: Tensor, gate: Tensor, valid: Tensor | None, scale: float) -> tuple:
    if valid is not None and valid.ndim == 2:
        valid = valid[:, :, None].expand(q.shape[:3])
    return (
        0 if valid is None else valid.data_ptr(),
        [0, 0, 0] if valid is None else list(valid.stride()),
        list(q.shape),
        scale,
        dispatch.dtype_code(q.dtype),
        dispatch.dtype_code(gate.dtype),
    )
