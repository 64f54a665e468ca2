"""Lower median over dates (specification: gyroscope.md, Definition).

Memory-bound: x is read T times over, once from memory and T - 1 times from L1; values and indices
are written once. The compare count per channel is T².
"""

import torch
import triton
import triton.language as tl

from timo.kernels.launch import grid


@triton.jit
def lower_median(
    p_x, p_valid, m, T, x_t, v_t, HAS_VALID: tl.constexpr, DATES: tl.constexpr
):  # fmt: skip
    """Of channels [BLOCK] at their first date, those with `m`: the selected date, -1 for none.

    Returns values in float32 and which of them are valid, both [DATES, BLOCK], and the dates.
    """
    t = tl.arange(0, DATES).to(tl.int64)[:, None]  # [DATES, 1]
    m_t = (t < T) & m[None, :]  # [DATES, BLOCK]
    if HAS_VALID:
        m_t &= tl.load(p_valid[None, :] + t * v_t, mask=m_t, other=0) != 0
    # Beyond T or invalid: +inf never counts as smaller, and such a date is never chosen.
    x = tl.load(p_x[None, :] + t * x_t, mask=m_t, other=float("inf"))
    x = x.to(tl.float32)  # [DATES, BLOCK]
    count = tl.sum(m_t.to(tl.int32), axis=0)  # [BLOCK]
    less = tl.zeros(x.shape, dtype=tl.int32)
    not_more = tl.zeros(x.shape, dtype=tl.int32)
    p_s, p_vs = p_x, p_valid  # stepping pointers keeps date offsets in 64 bits
    for _ in range(T):
        m_s = m
        if HAS_VALID:
            m_s = m & (tl.load(p_vs, mask=m, other=0) != 0)
        x_s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
        less += (m_s[None, :] & (x_s < x)).to(tl.int32)
        not_more += (m_s[None, :] & (x_s <= x)).to(tl.int32)
        p_s += x_t
        p_vs += v_t
    middle = ((count - 1) // 2)[None, :]
    # The lowest date whose ranks hold the middle; a NaN among the valid dates comes before.
    holds = m_t & (less <= middle) & (middle < not_more)
    lowest = tl.min(tl.where(holds, t, DATES), axis=0)  # [BLOCK]
    first_nan = tl.min(tl.where(m_t & (x != x), t, DATES), axis=0)
    index = tl.where(first_nan < DATES, first_nan, lowest)
    index = tl.where(count > 0, index, -1).to(tl.int64)
    return x, m_t, index


@triton.jit
def median_kernel(
    p_x, p_valid, p_values, p_indices,
    channels, H, D, T,
    x_b, x_t, x_n, x_h,
    v_b, v_t, v_n,
    HAS_VALID: tl.constexpr, DATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of one sample; DATES is T rounded up to a power of two."""
    blocks = tl.cdiv(channels, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)  # [BLOCK] of (N, H, D)
    m = o < channels
    n = o // (H * D)
    p_x += b * x_b + n * x_n + (o // D) % H * x_h + o % D  # [BLOCK]
    p_valid += b * v_b + n * v_n  # [BLOCK]
    _, _, index = lower_median(p_x, p_valid, m, T, x_t, v_t, HAS_VALID, DATES)
    value = tl.load(p_x + index * x_t, mask=m & (index >= 0), other=0.0)
    tl.store(p_values + b * channels + o, value, mask=m)
    tl.store(p_indices + b * channels + o, index, mask=m)


@triton.jit
def scatter_kernel(p_grad, p_indices, p_out, T, channels, BLOCK: tl.constexpr):
    """One program: BLOCK channels of one sample, written for every date."""
    blocks = tl.cdiv(channels, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)
    m = o < channels
    grad = tl.load(p_grad + b * channels + o, mask=m, other=0.0)
    index = tl.load(p_indices + b * channels + o, mask=m, other=-1)
    p_out += b * T * channels + o
    for t in range(T):
        tl.store(p_out, tl.where(index == t, grad, 0.0), mask=m)
        p_out += channels


def forward_config(dates: int) -> dict[str, int]:
    """Tile of (dates, channels): 8 values a thread, both counts in registers; 16 of 256 dates."""
    rounded = triton.next_power_of_2(dates)
    block = min(512, max(16, 2048 // rounded))
    return {"DATES": rounded, "BLOCK": block, "num_warps": min(8, max(4, rounded * block // 256))}


def forward(x, valid, values, indices) -> None:
    """Fill values and indices from x (B, T, N, H, D), last stride 1, and valid (B, T, N)."""
    B, T, N, H, D = x.shape
    config = forward_config(T)
    with _device(x):
        median_kernel[grid(B, triton.cdiv(N * H * D, config["BLOCK"]))](
            x, x if valid is None else valid.view(torch.uint8), values, indices,
            N * H * D, H, D, T, *x.stride()[:4], *((0, 0, 0) if valid is None else valid.stride()),
            HAS_VALID=valid is not None, **config,
        )  # fmt: skip


def backward(grad, indices, out) -> None:
    """Write out (B, T, N, H, D): grad (B, N, H, D) at the selected dates, 0 elsewhere."""
    B, T = out.shape[:2]
    channels = grad[0].numel()
    with _device(grad):
        scatter_kernel[grid(B, triton.cdiv(channels, 1024))](
            grad, indices, out, T, channels, BLOCK=1024, num_warps=4
        )


def _device(x):
    """Launch on x's device; a no-op for CPU tensors under the interpreter."""
    return torch.cuda.device_of(x)
