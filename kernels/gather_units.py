"""Mask-aware patch gathering (specification: units.md).

Memory-bound. A pixel's place, visibility and validity are worked out once for all its bands; after
that a value costs a load, a multiply-add, a selection and a store, and neighbouring threads touch
neighbouring pixels of a row. The frames' gradient is in gather form: the tiles that hold a pixel
are added in one order, whatever runs first.

Integers that follow from the batch, the dates and the number of units are not specialised on, so
new ones compile nothing.
"""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from timo.kernels.launch import grid

PIXELS = 512  # of one program, for BANDS bands at a time
SIZES = ("T", "H", "W", "K")
X_STRIDES = ("x_b", "x_t", "x_c", "x_h")
V_STRIDES = ("v_b", "v_t", "v_h", "v_w")


@triton.jit(do_not_specialize=("K", "units", "step"))
def place_kernel(p_ids, p_places, K, units, step, BLOCK: tl.constexpr):
    """Place of every unit among a sample's ids, which ascend; -1 where it is not among them.

    One program: BLOCK units of one sample, by bisection; step is a power of two in (K / 2, K].
    """
    blocks = tl.cdiv(units, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    u = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    p_ids += b * K
    place = tl.zeros([BLOCK], tl.int32)  # that many ids are known to lie below u
    while step > 0:
        m = place + step <= K
        below = tl.load(p_ids + place + step - 1, mask=m, other=0) < u
        place += tl.where(m & below, step, 0)
        step = step // 2
    found = tl.load(p_ids + place, mask=place < K, other=-1) == u
    tl.store(p_places + b * units + u, tl.where(found, place, -1), mask=u < units)


@triton.jit
def physical(
    p_x, p_scale, p_offset, c, x_c, m_c, m_x, HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr
):
    """Pixels after scale and offset, [BANDS, BLOCK], of bands c [BANDS]; p_x is at band 0."""
    value = tl.load(p_x[None, :] + c.to(tl.int64)[:, None] * x_c, mask=m_x, other=0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(p_scale + c, mask=m_c, other=0.0)[:, None]
    if HAS_OFFSET:
        value += tl.load(p_offset + c, mask=m_c, other=0.0)[:, None]
    return value


@triton.jit(do_not_specialize=(*SIZES, *X_STRIDES, *V_STRIDES))
def gather_kernel(
    p_x, p_ids, p_places, p_scale, p_offset, p_valid, p_tiles,
    C, T, H, W, K,
    x_b: tl.int64, x_t: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, v_w: tl.int64,
    HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_VALID: tl.constexpr,
    UNIT: tl.constexpr, BEFORE: tl.constexpr, SIZE: tl.constexpr,
    BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK pixels of one tile, all bands."""
    CHUNKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    n = tl.program_id(0) // CHUNKS
    tile, b = n.to(tl.int64), (n // K).to(tl.int64)
    p = tl.program_id(0) % CHUNKS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] of (SIZE, SIZE)
    h, w = tl.cdiv(H, UNIT), tl.cdiv(W, UNIT)
    unit = tl.load(p_ids + tile)
    t = unit // (h * w)
    y = (unit // w % h).to(tl.int32) * UNIT - BEFORE + p // SIZE
    x = (unit % w).to(tl.int32) * UNIT - BEFORE + p % SIZE
    m_p = p < SIZE * SIZE
    # Ids are not checked on a GPU: one out of range must not read elsewhere.
    m = m_p & (y >= 0) & (y < H) & (x >= 0) & (x < W) & (unit >= 0) & (t < T)
    p_places += (b * T + t) * h * w
    place = tl.load(p_places + y // UNIT * w + x // UNIT, mask=m, other=-1)
    m &= place >= 0
    y, x = y.to(tl.int64), x.to(tl.int64)
    if HAS_VALID:
        p_valid += b * v_b + t * v_t
        m &= tl.load(p_valid + y * v_h + x * v_w, mask=m, other=0) != 0
    p_x += b * x_b + t * x_t
    p_x += y * x_h + x * x_w  # [BLOCK]
    p_tiles += tile * C * (SIZE * SIZE) + p
    for start in range(0, C, BANDS):
        c = start + tl.arange(0, BANDS)
        m_c = c < C
        m_x = m_c[:, None] & m[None, :]  # [BANDS, BLOCK]
        value = physical(p_x, p_scale, p_offset, c, x_c, m_c, m_x, HAS_SCALE, HAS_OFFSET)
        value = tl.where(m_x, value, 0.0).to(p_tiles.dtype.element_ty)
        p_band = p_tiles[None, :] + c.to(tl.int64)[:, None] * (SIZE * SIZE)
        tl.store(p_band, value, mask=m_c[:, None] & m_p[None, :])


@triton.jit(do_not_specialize=(*SIZES, *V_STRIDES))
def gather_backward_kernel(
    p_grad, p_places, p_scale, p_valid, p_out,
    C, T, H, W, K,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, v_w: tl.int64,
    HAS_SCALE: tl.constexpr, HAS_VALID: tl.constexpr,
    UNIT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK pixels of one unit, visible or not, all bands.

    Pixels of unit i lie in tiles of the units i - BACK ... i + AHEAD, in both directions.
    """
    CHUNKS: tl.constexpr = (UNIT * UNIT + BLOCK - 1) // BLOCK
    SIZE: tl.constexpr = BEFORE + UNIT + AFTER
    BACK: tl.constexpr = (AFTER + UNIT - 1) // UNIT
    AHEAD: tl.constexpr = (BEFORE + UNIT - 1) // UNIT
    SPAN: tl.constexpr = BACK + 1 + AHEAD
    n = tl.program_id(0) // CHUNKS
    p = tl.program_id(0) % CHUNKS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] of (UNIT, UNIT)
    h, w = tl.cdiv(H, UNIT), tl.cdiv(W, UNIT)
    b, unit = (n // (T * h * w)).to(tl.int64), n % (T * h * w)
    t, i, j = (unit // (h * w)).to(tl.int64), unit // w % h, unit % w
    y, x = i * UNIT + p // UNIT, j * UNIT + p % UNIT
    m_p = (p < UNIT * UNIT) & (y < H) & (x < W)
    p_places += (b * T + t) * h * w
    visible = tl.load(p_places + i * w + j) >= 0
    m = m_p & visible
    if HAS_VALID:
        o_v = b * v_b + t * v_t + y.to(tl.int64) * v_h + x.to(tl.int64) * v_w
        m &= tl.load(p_valid + o_v, mask=m, other=0) != 0
    tiles = tl.where(visible, SPAN * SPAN, 0)
    p_out += (b * T + t) * C * H * W + y.to(tl.int64) * W + x
    for start in range(0, C, BANDS):
        c = start + tl.arange(0, BANDS)
        m_c = c < C
        o_c = c.to(tl.int64)[:, None]  # [BANDS, 1]
        total = tl.zeros([BANDS, BLOCK], tl.float32)
        for n in range(tiles):
            di, dj = n // SPAN - BACK, n % SPAN - BACK
            there = (i + di >= 0) & (i + di < h) & (j + dj >= 0) & (j + dj < w)
            place = tl.load(p_places + (i + di) * w + j + dj, mask=there, other=-1)
            if place >= 0:
                row, column = p // UNIT + BEFORE - di * UNIT, p % UNIT + BEFORE - dj * UNIT
                m_n = m & (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
                p_tile = p_grad + ((b * K + place) * C + o_c) * (SIZE * SIZE)
                p_tile += (row * SIZE + column)[None, :]  # [BANDS, BLOCK]
                grad = tl.load(p_tile, mask=m_c[:, None] & m_n[None, :], other=0.0)
                total += grad.to(tl.float32)
        if HAS_SCALE:
            total *= tl.load(p_scale + c, mask=m_c, other=0.0)[:, None]
        total = tl.where(m[None, :], total, 0.0).to(p_out.dtype.element_ty)
        p_band = p_out[None, :] + o_c * (H.to(tl.int64) * W)
        tl.store(p_band, total, mask=m_c[:, None] & m_p[None, :])


def forward(frames, ids, scale, offset, valid, unit, before, after, dtype) -> Tensor:
    """Tiles of `timo.ops.gather_units.reference`, on the frames' device."""
    B, T, C, H, W = frames.shape
    K, size = ids.shape[1], before + unit + after
    ids, scale, offset = map(near, (ids, scale, offset))
    tiles = torch.empty((B, K, C, size, size), dtype=dtype, device=frames.device)
    with torch.cuda.device_of(frames):
        where = places(ids, unit_count(T, H, W, unit))
        usable, strides = validity(valid, frames)
        gather_kernel[grid(B, K, triton.cdiv(size**2, PIXELS))](
            frames, ids, where, scale, offset, usable, tiles,
            C, T, H, W, K, *frames.stride(), *strides,
            HAS_SCALE=scale is not None, HAS_OFFSET=offset is not None,
            HAS_VALID=valid is not None, UNIT=unit, BEFORE=before, SIZE=size, **bands(C),
        )  # fmt: skip
    return tiles


def backward(grad, ids, scale, valid, dates, height, width, unit, before, after, dtype) -> Tensor:
    """Gradient of the frames, as `timo.ops.gather_units.reference_backward`."""
    B, K, C = grad.shape[:3]
    grad, ids, scale = map(near, (grad, ids, scale))
    out = torch.empty((B, dates, C, height, width), dtype=dtype, device=grad.device)
    units = unit_count(dates, height, width, unit)
    with torch.cuda.device_of(grad):
        where = places(ids, units)
        usable, strides = validity(valid, out)
        gather_backward_kernel[grid(B, units, triton.cdiv(unit**2, PIXELS))](
            grad, where, scale, usable, out,
            C, dates, height, width, K, *strides,
            HAS_SCALE=scale is not None, HAS_VALID=valid is not None,
            UNIT=unit, BEFORE=before, AFTER=after, **bands(C), maxnreg=backward_registers(unit),
        )  # fmt: skip
    return out


def places(ids: Tensor, units: int) -> Tensor:
    """(B, units) int32: which of a sample's ids (B, K), contiguous, a unit is; -1 for none."""
    B, K = ids.shape
    out = torch.empty((B, units), dtype=torch.int32, device=ids.device)
    step = 1 << (K.bit_length() - 1)
    place_kernel[grid(B, triton.cdiv(units, 256))](ids, out, K, units, step, BLOCK=256, num_warps=4)
    return out


def validity(valid: Tensor | None, frames: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """Validity as bytes, and its strides over (B, T, H, W)."""
    if valid is None:
        return None, (0, 0, 0, 0)
    if valid.ndim == 2:
        valid = valid[:, :, None, None].expand(*frames.shape[:2], *frames.shape[3:])
    return valid.view(torch.uint8), valid.stride()


@overload
def near(x: Tensor) -> Tensor: ...


@overload
def near(x: Tensor | None) -> Tensor | None: ...


def near(x: Tensor | None) -> Tensor | None:
    """x without gaps, which all but frames and validity must be."""
    return None if x is None else x.contiguous()


def bands(C: int) -> dict[str, int]:
    """Tile of (bands, pixels): up to 16 values a thread, that many loads in flight."""
    return {"BANDS": min(4, triton.next_power_of_2(C)), "BLOCK": PIXELS, "num_warps": 4}


def backward_registers(unit: int) -> int | None:
    """Limit for units whose divisions are multiplications; else the compiler would spill some."""
    return 64 if unit & (unit - 1) else None


def unit_count(dates: int, height: int, width: int, unit: int) -> int:
    return dates * triton.cdiv(height, unit) * triton.cdiv(width, unit)
