"""Lower median over dates and every date's projected deviation (specification: gyroscope.md).

Memory-bound: forward reads q as temporal_median does and has all dates of a head at hand when its
median is found; backward reads q once and writes its gradient once. The gradient of the weight is
summed over the rows of a program and then, by torch, over the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from timo.kernels.launch import grid
from timo.kernels.temporal_median import lower_median


@triton.jit
def rows_and_channels(rows, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sample and first row of this program; its rows of (N, H) and channels, which of them exist,
    and their place in a sample's (N, H, D); each [ROWS * WIDTH]."""
    blocks = tl.cdiv(rows, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    o = tl.arange(0, ROWS * WIDTH)
    row = first + o // WIDTH
    d = o % WIDTH
    return b, first, row, d, (row < rows) & (d < D), row * D + d


@triton.jit
def deviation_kernel(
    p_x, p_weight, p_valid, p_values, p_indices, p_deviation,
    rows, H, D, T,
    x_b, x_t, x_n, x_h,
    v_b, v_t, v_n,
    HAS_VALID: tl.constexpr, DATES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS heads of one sample; DATES and WIDTH are T and D rounded up."""
    b, first, row, d, m, o = rows_and_channels(rows, D, ROWS, WIDTH)
    p_x += b * x_b + row // H * x_n + row % H * x_h + d
    p_valid += b * v_b + row // H * v_n
    x, m_t, index = lower_median(p_x, p_valid, m, T, x_t, v_t, HAS_VALID, DATES)
    value = tl.load(p_x + index * x_t, mask=m & (index >= 0), other=0.0)
    tl.store(p_values + b * rows * D + o, value, mask=m)
    tl.store(p_indices + b * rows * D + o, index, mask=m)
    weight = tl.load(p_weight + d, mask=m, other=0.0)
    part = weight[None, :] * tl.where(m_t, x - value.to(tl.float32)[None, :], 0.0)
    deviation = tl.sum(tl.reshape(part, [DATES, ROWS, WIDTH]), axis=2)  # [DATES, ROWS]
    t = tl.arange(0, DATES).to(tl.int64)[:, None]
    r = first + tl.arange(0, ROWS)[None, :]
    tl.store(p_deviation + (b * T + t) * rows + r, deviation, mask=(t < T) & (r < rows))


@triton.jit
def deviation_backward_kernel(
    p_x, p_weight, p_valid, p_values, p_indices, p_dvalues, p_ddeviation, p_dx, p_partial,
    rows, H, D, T,
    x_b, x_t, x_n, x_h,
    v_b, v_t, v_n,
    HAS_VALID: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS heads of one sample, date by date."""
    b, _, row, d, m, o = rows_and_channels(rows, D, ROWS, WIDTH)
    p_x += b * x_b + row // H * x_n + row % H * x_h + d
    p_valid += b * v_b + row // H * v_n
    p_grad = p_ddeviation + b * T * rows + row
    weight = tl.load(p_weight + d, mask=m, other=0.0)
    value = tl.load(p_values + b * rows * D + o, mask=m, other=0.0).to(tl.float32)
    index = tl.load(p_indices + b * rows * D + o, mask=m, other=-1)
    rest = tl.load(p_dvalues + b * rows * D + o, mask=m, other=0.0).to(tl.float32)
    p_g, p_v = p_grad, p_valid
    for _ in range(T):  # a median moves the deviations of all dates
        m_g = m
        if HAS_VALID:
            m_g = m & (tl.load(p_v, mask=m, other=0) != 0)
        rest -= weight * tl.load(p_g, mask=m_g, other=0.0)
        p_g += rows
        p_v += v_t
    sums = tl.zeros([ROWS * WIDTH], dtype=tl.float32)
    p_dx += b * T * rows * D + o
    for t in range(T):
        m_t = m
        if HAS_VALID:
            m_t = m & (tl.load(p_valid, mask=m, other=0) != 0)
        grad = tl.load(p_grad, mask=m_t, other=0.0)
        x = tl.load(p_x, mask=m_t, other=0.0).to(tl.float32)
        dx = weight * grad + tl.where(index == t, rest, 0.0)
        tl.store(p_dx, tl.where(m_t, dx, 0.0).to(p_dx.dtype.element_ty), mask=m)
        sums += tl.where(m_t, grad * (x - value), 0.0)
        p_x += x_t
        p_valid += v_t
        p_grad += rows
        p_dx += rows * D
    channel = tl.arange(0, WIDTH)
    program = tl.program_id(0).to(tl.int64)
    partial = tl.sum(tl.reshape(sums, [ROWS, WIDTH]), axis=0)  # [WIDTH]
    tl.store(p_partial + program * D + channel, partial, mask=channel < D)


def forward_config(dates: int, head_dim: int) -> dict[str, int]:
    """Tile of (dates, heads, channels): 4 values a thread, so both counts stay in registers.

    32 of the greatest tile: with 16 warps, a thread of which has 128 registers, it spills.
    """
    rounded, width = triton.next_power_of_2(dates), triton.next_power_of_2(head_dim)
    rows = max(1, min(256, max(16, 2048 // rounded)) // width)
    warps = min(8, max(4, rounded * rows * width // 128))
    return {"DATES": rounded, "ROWS": rows, "WIDTH": width, "num_warps": warps}


def backward_config(head_dim: int) -> dict[str, int]:
    """Tile of (heads, channels): 4 values a thread, and their addresses."""
    width = triton.next_power_of_2(head_dim)
    return {"ROWS": max(1, 512 // width), "WIDTH": width, "num_warps": 4}


def forward(x, weight, valid, values, indices, deviation) -> None:
    """Fill the results from x (B, T, N, H, D), last stride 1, and valid (B, T, N)."""
    B, T, N, H, D = x.shape
    config = forward_config(T, D)
    with torch.cuda.device_of(x):
        deviation_kernel[grid(B, triton.cdiv(N * H, config["ROWS"]))](
            x, weight, _bytes(x, valid), values, indices, deviation, *_sizes(x, valid), **config
        )


def backward(x, weight, valid, values, indices, dvalues, ddeviation, dx) -> Tensor:
    """Write dx (B, T, N, H, D) and return the gradient of the weight."""
    B, T, N, H, D = x.shape
    config = backward_config(D)
    programs = triton.cdiv(N * H, config["ROWS"])
    partial = torch.empty((B * programs, D), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        deviation_backward_kernel[grid(B, programs)](
            x, weight, _bytes(x, valid), values, indices, dvalues, ddeviation, dx, partial,
            *_sizes(x, valid), **config,
        )  # fmt: skip
    return partial.sum(0)


def _bytes(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else valid.view(torch.uint8)


def _sizes(x: Tensor, valid: Tensor | None) -> tuple:
    """Sizes and strides as both kernels take them, and whether there is validity."""
    _, T, N, H, D = x.shape
    strides = (0, 0, 0) if valid is None else valid.stride()
    return N * H, H, D, T, *x.stride()[:4], *strides, valid is not None
