"""Loss of the masked autoencoder: squared error against the frames themselves.

Memory-bound: forward reads predictions once and frames once, or twice for "batch", backward reads
both again. One program holds one unit, so that passes for its mean, its variance and its error
find it in L1. Partial sums are one a unit and added up by one program in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from timo.kernels.gather_units import V_STRIDES, X_STRIDES, near, physical, validity
from timo.kernels.launch import grid

EPS = tl.constexpr(1e-6)  # added to the variance, as in timo.ops.masked_pixel_loss
SIZES = ("T", "H", "W", "M")


@triton.jit
def corner(
    p_x, unit, b, T, H, W, x_b, x_t, x_h, x_w, v_b, v_t, v_h, v_w,
    STEP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Frames at the first pixel of a unit, offset of validity, its rows and columns in the frame.

    An id out of range, which is not checked on a GPU, has none.
    """
    h, w = tl.cdiv(H, UNIT), tl.cdiv(W, UNIT)
    t, y, x = unit // (h * w), unit // w % h * UNIT, unit % w * UNIT  # 64-bit, as ids are
    p_x += (b * x_b + t * x_t + y * x_h) * STEP + x * x_w
    o_valid = b * v_b + t * v_t + y * v_h + x * v_w
    known = (unit >= 0) & (t < T)
    return p_x, o_valid, tl.where(known, H - y, 0), tl.where(known, W - x, 0)


@triton.jit
def place(
    p_x, p_valid, start, rows, columns, x_h, x_w, v_h, v_w,
    STEP: tl.constexpr, HAS_VALID: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Frames at pixels [BLOCK] of a unit, which of them exist, and which of those are valid.

    Invalid pixels are read too: a mask by pixel would tear up wide loads.
    """
    p = start + tl.arange(0, BLOCK)
    y, x = p // UNIT, p % UNIT
    inside = (y < rows) & (rows > 0)
    if UNIT * UNIT % BLOCK:
        inside &= p < UNIT * UNIT
    if STEP == 1:  # otherwise units end where rows do
        inside &= x < columns
    m = inside
    y, x = y.to(tl.int64), x.to(tl.int64)
    if HAS_VALID:
        m = inside & (tl.load(p_valid + y * v_h + x * v_w, mask=inside, other=0) != 0)
    return p_x + y * x_h * STEP + x * x_w, inside, m


@triton.jit(do_not_specialize=(*SIZES, *X_STRIDES, *V_STRIDES))
def loss_kernel(
    p_pred, p_x, p_ids, p_scale, p_offset, p_valid, p_mean, p_rstd, p_sum, p_count,
    C, T, H, W, M,
    x_b: tl.int64, x_t: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, v_w: tl.int64,
    NORM: tl.constexpr, LOSS: tl.constexpr, STEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_VALID: tl.constexpr,
    UNIT: tl.constexpr, BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one unit. Statistics unless NORM is "none", and the sum of squared errors.

    "batch" takes two launches. The first, without LOSS, leaves mean and sum of squared deviations
    in `mean` and `rstd`; the second reads there what all units have in common.
    """
    STATISTICS: tl.constexpr = NORM == "patch" or (NORM == "batch" and not LOSS)
    n = tl.program_id(0).to(tl.int64)
    p_x, o_valid, rows, columns = corner(
        p_x, tl.load(p_ids + n), n // M, T, H, W, x_b, x_t, x_h, x_w, v_b, v_t, v_h, v_w, STEP, UNIT
    )
    if HAS_VALID:
        p_valid += o_valid
    count = 0
    total = tl.zeros([BANDS, BLOCK], tl.float32)
    for start in range(0, UNIT * UNIT, BLOCK):
        p, inside, m = place(
            p_x, p_valid, start, rows, columns, x_h, x_w, v_h, v_w, STEP, HAS_VALID, UNIT, BLOCK
        )
        count += C * tl.sum(m.to(tl.int32))
        if STATISTICS:
            for first in range(0, C, BANDS):
                c = first + tl.arange(0, BANDS)
                m_x = (c < C)[:, None] & inside[None, :]  # [BANDS, BLOCK]
                x = physical(p, p_scale, p_offset, c, x_c * STEP, c < C, m_x, HAS_SCALE, HAS_OFFSET)
                total += tl.where(m_x & m[None, :], x, 0.0)
    tl.store(p_count + n, count)

    mean, rstd = 0.0, 1.0
    if NORM == "batch" and LOSS:
        mean, rstd = tl.load(p_mean + n), tl.load(p_rstd + n)
    if STATISTICS:
        # The mean's rounding error shows as a mean of the deviations, and is taken off both.
        mean = tl.sum(total) / tl.maximum(count, 1)
        rest = tl.zeros([BANDS, BLOCK], tl.float32)
        squares = tl.zeros([BANDS, BLOCK], tl.float32)
        for start in range(0, UNIT * UNIT, BLOCK):
            p, inside, m = place(
                p_x, p_valid, start, rows, columns, x_h, x_w, v_h, v_w,
                STEP, HAS_VALID, UNIT, BLOCK,
            )  # fmt: skip
            for first in range(0, C, BANDS):
                c = first + tl.arange(0, BANDS)
                m_x = (c < C)[:, None] & inside[None, :]
                x = physical(p, p_scale, p_offset, c, x_c * STEP, c < C, m_x, HAS_SCALE, HAS_OFFSET)
                deviation = tl.where(m_x & m[None, :], x - mean, 0.0)
                rest += deviation
                squares += deviation * deviation
        shift = tl.sum(rest) / tl.maximum(count, 1)
        mean += shift
        spread = tl.maximum(tl.sum(squares) - shift * tl.sum(rest), 0.0)
        rstd = spread
        if NORM == "patch":
            rstd = 1.0 / tl.sqrt_rn(spread / tl.maximum(count - 1, 1) + EPS)
    if NORM != "batch" or not LOSS:
        tl.store(p_mean + n, mean)
        tl.store(p_rstd + n, rstd)

    if LOSS:
        error = tl.zeros([BANDS, BLOCK], tl.float32)
        p_pred += n * C * (UNIT * UNIT)
        for start in range(0, UNIT * UNIT, BLOCK):
            p, inside, m = place(
                p_x, p_valid, start, rows, columns, x_h, x_w, v_h, v_w,
                STEP, HAS_VALID, UNIT, BLOCK,
            )  # fmt: skip
            for first in range(0, C, BANDS):
                c = first + tl.arange(0, BANDS)
                m_x = (c < C)[:, None] & inside[None, :]
                x = physical(p, p_scale, p_offset, c, x_c * STEP, c < C, m_x, HAS_SCALE, HAS_OFFSET)
                p_guess = p_pred + c[:, None] * (UNIT * UNIT) + start + tl.arange(0, BLOCK)[None, :]
                guess = tl.load(p_guess, mask=m_x, other=0.0).to(tl.float32)
                e = tl.where(m_x & m[None, :], guess - (x - mean) * rstd, 0.0)
                error += e * e
        tl.store(p_sum + n, tl.sum(error))


@triton.jit(do_not_specialize=("units",))
def batch_kernel(p_mean, p_rstd, p_count, units, BLOCK: tl.constexpr):
    """One program: means and squared deviations of all units become those of all their pixels.

    In float64, which so few numbers can afford.
    """
    o = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float64)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, units, BLOCK):
        m = start + o < units
        n = tl.load(p_count + start + o, mask=m, other=0).to(tl.float64)
        counts += n
        sums += n * tl.load(p_mean + start + o, mask=m, other=0.0).to(tl.float64)
    count = tl.sum(counts)
    mean = tl.sum(sums) / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, units, BLOCK):
        m = start + o < units
        n = tl.load(p_count + start + o, mask=m, other=0).to(tl.float64)
        d = tl.load(p_mean + start + o, mask=m, other=0.0).to(tl.float64) - mean
        squares += n * d * d + tl.load(p_rstd + start + o, mask=m, other=0.0).to(tl.float64)
    variance = (tl.sum(squares) / tl.maximum(count - 1.0, 1.0)).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(variance + EPS)
    tl.debug_barrier()  # every thread has read what is now overwritten
    for start in range(0, units, BLOCK):
        m = start + o < units
        tl.store(p_mean + start + o, tl.zeros([BLOCK], tl.float32) + mean.to(tl.float32), mask=m)
        tl.store(p_rstd + start + o, tl.zeros([BLOCK], tl.float32) + rstd, mask=m)


@triton.jit(do_not_specialize=("units",))
def total_kernel(p_sum, p_count, p_loss, p_total, units, BLOCK: tl.constexpr):
    """One program: loss and count from those of all units."""
    o = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, units, BLOCK):
        m = start + o < units
        counts += tl.load(p_count + start + o, mask=m, other=0)
        sums += tl.load(p_sum + start + o, mask=m, other=0.0).to(tl.float64)
    count = tl.sum(counts)
    tl.store(p_loss, (tl.sum(sums) / tl.maximum(count, 1).to(tl.float64)).to(tl.float32))
    tl.store(p_total, count)


@triton.jit(do_not_specialize=(*SIZES, *X_STRIDES, *V_STRIDES))
def loss_backward_kernel(
    p_grad, p_pred, p_x, p_ids, p_scale, p_offset, p_valid, p_mean, p_rstd, p_total, p_out,
    C, T, H, W, M,
    x_b: tl.int64, x_t: tl.int64, x_c: tl.int64, x_h: tl.int64, x_w,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, v_w: tl.int64,
    STEP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_VALID: tl.constexpr,
    UNIT: tl.constexpr, BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK pixels of one unit, all bands."""
    CHUNKS: tl.constexpr = (UNIT * UNIT + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // CHUNKS).to(tl.int64)
    start = tl.program_id(0) % CHUNKS * BLOCK
    p_x, o_valid, rows, columns = corner(
        p_x, tl.load(p_ids + n), n // M, T, H, W, x_b, x_t, x_h, x_w, v_b, v_t, v_h, v_w, STEP, UNIT
    )
    if HAS_VALID:
        p_valid += o_valid
    p, inside, m = place(
        p_x, p_valid, start, rows, columns, x_h, x_w, v_h, v_w, STEP, HAS_VALID, UNIT, BLOCK
    )
    mean, rstd = tl.load(p_mean + n), tl.load(p_rstd + n)
    factor = 2.0 * tl.load(p_grad) / tl.maximum(tl.load(p_total), 1).to(tl.float32)
    o = n * C * (UNIT * UNIT) + start + tl.arange(0, BLOCK)
    in_unit = start + tl.arange(0, BLOCK) < UNIT * UNIT
    for first in range(0, C, BANDS):
        c = first + tl.arange(0, BANDS)
        m_x = (c < C)[:, None] & inside[None, :]  # [BANDS, BLOCK]
        x = physical(p, p_scale, p_offset, c, x_c * STEP, c < C, m_x, HAS_SCALE, HAS_OFFSET)
        o_c = o[None, :] + c[:, None] * (UNIT * UNIT)
        guess = tl.load(p_pred + o_c, mask=m_x, other=0.0).to(tl.float32)
        e = tl.where(m_x & m[None, :], (guess - (x - mean) * rstd) * factor, 0.0)
        m_out = (c < C)[:, None] & in_unit[None, :]
        tl.store(p_out + o_c, e.to(p_out.dtype.element_ty), mask=m_out)


def forward(pred, frames, masked_ids, scale, offset, valid, unit, norm) -> tuple[Tensor, ...]:
    """Loss, mean, rstd and count of `timo.ops.masked_pixel_loss.reference`."""
    B, M = masked_ids.shape
    pred, ids, scale, offset = map(near, (pred, masked_ids, scale, offset))
    loss, count = empty((), torch.float32, pred), empty((), torch.int64, pred)
    mean, rstd, sums = (empty((B, M), torch.float32, pred) for _ in range(3))
    counts = empty((B, M), torch.int32, pred)
    with torch.cuda.device_of(pred):
        usable, numbers, constants = arguments(frames, M, scale, offset, valid, unit)

        def launch(loss: bool):
            loss_kernel[grid(B, M)](
                pred, frames, ids, scale, offset, usable, mean, rstd, sums, counts, *numbers,
                NORM=norm, LOSS=loss, **constants,
            )  # fmt: skip

        if norm == "batch":
            launch(loss=False)
            batch_kernel[(1,)](mean, rstd, counts, B * M, BLOCK=2048, num_warps=8)
        launch(loss=True)
        total_kernel[(1,)](sums, counts, loss, count, B * M, BLOCK=2048, num_warps=8)
    return loss, mean, rstd, count


def backward(
    grad, pred, frames, masked_ids, scale, offset, valid, unit, mean, rstd, count
) -> Tensor:  # fmt: skip
    """Gradient of the prediction, as `timo.ops.masked_pixel_loss.reference_backward`."""
    B, M = masked_ids.shape
    pred, ids, scale, offset, mean, rstd = map(near, (pred, masked_ids, scale, offset, mean, rstd))
    out = empty(pred.shape, pred.dtype, pred)
    with torch.cuda.device_of(pred):
        usable, numbers, constants = arguments(frames, M, scale, offset, valid, unit)
        loss_backward_kernel[grid(B, M, triton.cdiv(unit**2, constants["BLOCK"]))](
            grad, pred, frames, ids, scale, offset, usable, mean, rstd, count, out,
            *numbers, **constants,
        )  # fmt: skip
    return out


def arguments(frames, M, scale, offset, valid, unit) -> tuple[Tensor | None, tuple, dict]:
    """What both kernels take: validity as bytes, sizes and strides, and constants.

    Strides of frames, but for the last, count in STEP pixels: 16 where all are multiples and units
    fill the rows, which lets the compiler load 16 bytes at once whatever the batch or the dates.
    """
    _, T, C, H, W = frames.shape
    usable, strides = validity(valid, frames)
    aligned = W % unit == 0 and all(s % 16 == 0 for s in frames.stride()[:4])
    step = 16 if aligned else 1
    numbers = (C, T, H, W, M, *(s // step for s in frames.stride()[:4]), frames.stride(4), *strides)
    constants = {
        "STEP": step, "HAS_SCALE": scale is not None, "HAS_OFFSET": offset is not None,
        "HAS_VALID": valid is not None, "UNIT": unit, **tile(C, unit, step),
    }  # fmt: skip
    return usable, numbers, constants


def tile(C: int, unit: int, step: int) -> dict[str, int | None]:
    """Tile of (bands, pixels): up to 8 values a thread, that many loads in flight.

    Of rows that are not aligned, addresses take so many registers that the compiler would spill
    some for another block side by side; with a limit of its own it does not.
    """
    bands, block = min(4, triton.next_power_of_2(C)), min(512, triton.next_power_of_2(unit**2))
    warps = max(1, bands * block // 256)
    registers = 128 if step == 1 else None
    return {"BANDS": bands, "BLOCK": block, "num_warps": warps, "maxnreg": registers}


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
