"""Maximum over dates of bilinearly enlarged maps (specification: model.md §4), channels last.

Forward reads four entries of every date's map for each entry of the result, from L1 and L2 but for
the first of them, and writes the result once. Backward gathers: an entry of a date's gradient sums
the entries of the result that were mixed from it and took that date, (2·factor)² of them, so that
the result's gradient is read T times over. Sums are in float32, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from timo.kernels.launch import MOST, grid


@triton.jit
def mix(o, size, factor):
    """Entry o of an enlarged dimension: (1 - share) of entry low and share of entry high.

    Where one entry counts alone, high is low, and share is 0.
    """
    twice = tl.maximum(2 * o + 1 - factor, 0)
    low = twice // (2 * factor)
    share = (twice % (2 * factor)).to(tl.float32) / (2 * factor)
    share = tl.where(low + 1 < size, share, 0.0)
    return low, tl.where(share > 0, low + 1, low), share


@triton.jit
def mixed(low, high, share):
    """Not a product where one counts alone: the other may be infinite, or itself."""
    return tl.where(share > 0, low * (1 - share) + high * share, low)


@triton.jit
def maximum_kernel(
    p_maps, p_valid, p_values, p_dates,
    T, C, h, w, factor, x_t,
    v_b, v_t, v_h, v_w,
    HAS_VALID: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ENTRIES entries of the result of one sample, BLOCK channels."""
    entries = h * w * factor * factor
    parts, blocks = tl.cdiv(entries, ENTRIES), tl.cdiv(C, BLOCK)
    b = (tl.program_id(0) // (parts * blocks)).to(tl.int64)
    o = tl.program_id(0) // blocks % parts * ENTRIES + tl.arange(0, ENTRIES)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_o = o < entries
    m = m_o[:, None] & (c < C)  # [ENTRIES, BLOCK]
    y, x = o // (w * factor), o % (w * factor)
    top, bottom, down = mix(y, h, factor)
    left, right, across = mix(x, w, factor)
    down, across = down[:, None], across[:, None]
    p_maps += b * T * x_t + c
    p_valid += b * v_b + (y // factor).to(tl.int64) * v_h + (x // factor).to(tl.int64) * v_w
    top, bottom = top.to(tl.int64) * w, bottom.to(tl.int64) * w
    top_left, top_right = (top + left)[:, None] * C, (top + right)[:, None] * C
    bottom_left, bottom_right = (bottom + left)[:, None] * C, (bottom + right)[:, None] * C
    best = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
    date = tl.full((ENTRIES, BLOCK), -1, dtype=tl.int32)
    for t in range(T):
        m_t = m
        if HAS_VALID:
            m_t = m & (tl.load(p_valid, mask=m_o, other=0) != 0)[:, None]
        a = tl.load(p_maps + top_left, mask=m_t, other=0.0).to(tl.float32)
        z = tl.load(p_maps + bottom_left, mask=m_t, other=0.0).to(tl.float32)
        a = mixed(a, z, down)
        d = tl.load(p_maps + top_right, mask=m_t, other=0.0).to(tl.float32)
        z = tl.load(p_maps + bottom_right, mask=m_t, other=0.0).to(tl.float32)
        value = mixed(a, mixed(d, z, down), across)
        # Greater, or the first valid date, or the first NaN.
        take = (value > best) | (date < 0) | ((value != value) & (best == best))
        take = take & m_t
        best = tl.where(take, value, best)
        date = tl.where(take, t, date)
        p_maps += x_t  # stepping pointers keeps date offsets in 64 bits
        p_valid += v_t
    p = (b * entries + o)[:, None] * C + c
    tl.store(p_values + p, best.to(p_values.dtype.element_ty), mask=m)
    tl.store(p_dates + p, date.to(tl.int16), mask=m)


@triton.jit
def maximum_backward_kernel(
    p_grad, p_dates, p_maps, T, C, h, w, factor, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: ENTRIES entries of the gradient of one date's maps, BLOCK channels."""
    parts, blocks = tl.cdiv(h * w, ENTRIES), tl.cdiv(C, BLOCK)
    map_ = (tl.program_id(0) // (parts * blocks)).to(tl.int64)
    b, t = map_ // T, (map_ % T).to(tl.int32)
    e = tl.program_id(0) // blocks % parts * ENTRIES + tl.arange(0, ENTRIES)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = (e < h * w)[:, None] & (c < C)  # [ENTRIES, BLOCK]
    i, j = e // w, e % w
    height, width = h * factor, w * factor
    p_grad += b * height * width * C + c
    p_dates += b * height * width * C + c
    before = (factor - 1) // 2 + 1 - factor  # to the first entry that i or j is mixed into
    total = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
    for dy in range(2 * factor):
        y = i * factor + before + dy
        top, bottom, down = mix(y, h, factor)
        of_row = tl.where(top == i, 1 - down, 0.0) + tl.where(bottom == i, down, 0.0)
        m_y = (y >= 0) & (y < height)
        for dx in range(2 * factor):
            x = j * factor + before + dx
            left, right, across = mix(x, w, factor)
            weight = tl.where(left == j, 1 - across, 0.0) + tl.where(right == j, across, 0.0)
            weight = (weight * of_row)[:, None]
            m_x = m & (m_y & (x >= 0) & (x < width))[:, None] & (weight > 0)
            p = (y.to(tl.int64) * width + x)[:, None] * C
            date = tl.load(p_dates + p, mask=m_x, other=-1)
            grad = tl.load(p_grad + p, mask=m_x & (date == t), other=0.0).to(tl.float32)
            total += weight * grad
    p_maps += (map_ * h * w + e)[:, None] * C + c
    tl.store(p_maps, total.to(p_maps.dtype.element_ty), mask=m)


def tile(C: int) -> dict[str, int]:
    """Tile of (entries, channels), 4 values a thread. Without a limit ptxas takes so few registers
    that it spills."""
    block = min(128, max(16, triton.next_power_of_2(C)))
    return {"ENTRIES": 512 // block, "BLOCK": block, "num_warps": 4, "maxnreg": 128}


def programs(maps: int, entries: int, C: int) -> tuple[int]:
    """Grid for `entries` entries, which kernels count in 32 bits, of each of `maps` maps."""
    if entries > MOST:
        raise ValueError(f"a map of {entries:,} entries; it must have at most {MOST:,}: use tiles")
    config = tile(C)
    return grid(maps, triton.cdiv(entries, config["ENTRIES"]), triton.cdiv(C, config["BLOCK"]))


def forward(maps, valid, values, dates, size, factor) -> None:
    """Fill values and dates (B, fh, fw, C) from maps (B, T, h, w, C) and valid (B, T, h, w)."""
    B, T, C, h, w = size
    with torch.cuda.device_of(maps):
        maximum_kernel[programs(B, h * w * factor**2, C)](
            maps, maps if valid is None else valid.view(torch.uint8), values, dates, T, C, h, w,
            factor, h * w * C, *((0,) * 4 if valid is None else valid.stride()),
            HAS_VALID=valid is not None, **tile(C),
        )  # fmt: skip


def backward(maps, grad, dates, size, factor) -> None:
    """Write maps (B, T, h, w, C) from grad and dates (B, fh, fw, C)."""
    B, T, C, h, w = size
    programs(B, h * w * factor**2, C)  # raises
    with torch.cuda.device_of(grad):
        maximum_backward_kernel[programs(B * T, h * w, C)](
            grad, dates, maps, T, C, h, w, factor, **tile(C)
        )
