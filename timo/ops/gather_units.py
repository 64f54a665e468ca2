"""Mask-aware patch gathering: the visible units of a series, with a halo, as tiles."""

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from timo.ops import dispatch
from timo.ops import gather_units_compiled as compiled
from timo.ops.checks import (
    FLOATS,
    HALF_AND_SINGLE,
    RAW,
    check_same,
    check_shape,
    check_tensor,
    check_valid,
    dtype_name,
)
from timo.ops.dispatch import CPP, CUDA, REFERENCE, TRITON, Backend, Request
from timo.ops.library import define


def gather_units(
    frames: Tensor,
    visible_ids: Tensor,
    *,
    scale: Tensor | float | None = None,
    offset: Tensor | float | None = None,
    valid: Tensor | None = None,
    unit: int = 32,
    halo: tuple[int, int] = (3, 2),
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cut the visible units out of the frames, with what a convolution at their border reads.

    Unit (t, i, j) covers rows [unit * i, unit * i + unit) and columns likewise of frame t; its id
    is `t * h * w + i * w + j` with `h = ceil(H / unit)`, `w = ceil(W / unit)`. A tile adds
    `halo[0]` pixels before and `halo[1]` after, in both directions. A convolution without padding
    on tiles then equals the one with padding on the masked frames, at the visible units
    (specification: units.md; the default suits 7x7, stride 2, padding 3).

    Args:
        frames: (B, T, C, H, W) uint8, uint16 or floating, any strides.
        visible_ids: (B, K) int64, ascending. Order and range are checked on the CPU only; on a
            GPU that would make it wait.
        scale, offset: number or (C,) tensor, constants; a pixel x becomes `x * scale + offset`.
        valid: (B, T) or (B, T, H, W) bool, true where usable; all usable if None.
        unit: side of a unit, in pixels.
        halo: pixels of the surroundings (before, after).
        dtype: of the tiles; that of the frames if None, float32 for integers. The arithmetic is
            float32, or float64 if either is.
        backend: "auto", or the backends to choose among (see `timo.ops.explain`).

    Returns:
        (B, K, C, S, S) with `S = halo[0] + unit + halo[1]`. Pixels of masked units, outside the
        frame or invalid are exactly 0, after scale and offset. Differentiable in floating frames.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or ids.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("frames", frames, "(B, T, C, H, W)", RAW)
    check_ids("visible_ids", visible_ids, frames)
    check_valid_frames(valid, frames)
    check_unit(unit)
    sides = halo if isinstance(halo, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(x, int) and x >= 0 for x in sides):
        raise ValueError(f"halo is {halo!r}; it must be (before, after), ints in pixels, 0 or more")
    if dtype is None:
        dtype = frames.dtype if frames.is_floating_point() else torch.float32
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype_name(dtype)}; tiles must be of a floating dtype")
    wide = torch.float64 in (frames.dtype, dtype)
    scale = per_band("scale", scale, frames, wide)
    offset = per_band("offset", offset, frames, wide)
    return torch.ops.timo.gather_units(
        frames, visible_ids, scale, offset, valid, unit, *halo, dtype, backend
    )


def reference(
    frames: Tensor,
    visible_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
    before: int,
    after: int,
    dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch: pad, cut windows, apply scale and offset, clear what is not usable."""
    wide = torch.float64 in (frames.dtype, dtype)
    tiles = windows(frames, visible_ids, unit, before, after)
    pixels = physical(tiles, scale, offset, torch.float64 if wide else torch.float32)
    usable = visible_pixels(frames, visible_ids, valid, unit)
    return torch.where(windows(usable, visible_ids, unit, before, after), pixels, 0).to(dtype)


def reference_backward(
    grad: Tensor,
    visible_ids: Tensor,
    scale: Tensor | None,
    valid: Tensor | None,
    dates: int,
    height: int,
    width: int,
    unit: int,
    before: int,
    after: int,
    dtype: torch.dtype,
) -> Tensor:
    """The adjoint: put the tiles back on the grid, add where they overlap, clear the rest."""
    B, K, C, S, _ = grad.shape
    h, w = -(-height // unit), -(-width // unit)
    wide = torch.float64 in (grad.dtype, dtype)
    grad = grad.to(torch.float64 if wide else torch.float32)
    grid = grad.new_zeros((B, dates * h * w, C, S, S))
    grid.scatter_(1, visible_ids.view(B, K, 1, 1, 1).expand_as(grad), grad)
    columns = grid.view(B * dates, h * w, C * S * S).mT
    size = (h * unit + before + after, w * unit + before + after)
    frames = F.fold(columns, size, kernel_size=S, stride=unit)
    frames = frames[..., before : before + height, before : before + width]
    frames = frames.unflatten(0, (B, dates))
    if scale is not None:
        frames = frames * scale[:, None, None]
    return torch.where(visible_pixels(frames, visible_ids, valid, unit), frames, 0).to(dtype)


def windows(x: Tensor, ids: Tensor, unit: int, before: int, after: int) -> Tensor:
    """Tiles of the units `ids` with their halo: (B, T, C, H, W) -> (B, K, C, S, S), 0 outside."""
    dtype = x.dtype
    if dtype == torch.uint16:  # torch neither pads nor indexes it
        x = x.view(torch.int16)
    H, W = x.shape[-2:]
    h, w = -(-H // unit), -(-W // unit)
    x = F.pad(x, (before, w * unit - W + after, before, h * unit - H + after))
    size = before + unit + after
    x = x.unfold(3, size, unit).unfold(4, size, unit)  # [B, T, C, h, w, S, S], a view
    sample = torch.arange(x.shape[0], device=x.device)[:, None]
    frame, place = ids // (h * w), ids % (h * w)
    tiles = x[sample, frame, :, place // w, place % w]  # of strides that follow those of the ids
    return tiles.contiguous().view(dtype)


def physical(
    pixels: Tensor, scale: Tensor | None, offset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`pixels * scale + offset` per band, of tiles (B, K, C, S, S)."""
    pixels = pixels.to(dtype)
    if scale is not None:
        pixels = pixels * scale.to(dtype)[:, None, None]
    if offset is not None:
        pixels = pixels + offset.to(dtype)[:, None, None]
    return pixels


def visible_pixels(frames: Tensor, ids: Tensor, valid: Tensor | None, unit: int) -> Tensor:
    """Which pixels are valid and in a visible unit: (B, T, 1, H, W) bool."""
    B, T, _, H, W = frames.shape
    h, w = -(-H // unit), -(-W // unit)
    units = torch.zeros((B, T * h * w), dtype=torch.bool, device=ids.device)
    units = units.scatter(1, ids, True).view(B, T, h, w)
    pixels = units.repeat_interleave(unit, 2).repeat_interleave(unit, 3)
    return pixels[:, :, None, :H, :W] & valid_pixels(frames, valid)


def valid_pixels(frames: Tensor, valid: Tensor | None) -> Tensor:
    """Validity as a view (B, T, 1, H, W), whatever was given."""
    B, T, _, H, W = frames.shape
    if valid is None:
        valid = torch.ones((), dtype=torch.bool, device=frames.device)
    elif valid.ndim == 2:
        valid = valid[:, :, None, None]
    return valid.expand(B, T, H, W).unsqueeze(2)


def per_band(name: str, value: Tensor | float | None, frames: Tensor, wide: bool) -> Tensor | None:
    """A scale or offset as a (C,) tensor in the dtype of the arithmetic, or None."""
    if value is None:
        return None
    dtype = torch.float64 if wide else torch.float32
    bands = frames.shape[2]
    if isinstance(value, Real):
        return torch.full((bands,), float(value), dtype=dtype, device=frames.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a number or a tensor (C,)")
    check_tensor(name, value, "(C,)")
    check_shape(name, value, (bands,), "the bands of frames")
    check_same(name, value, "frames", frames, dtype=False)
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient; it is a constant here, pass it detached")
    return value.to(dtype)


def check_ids(name: str, ids: Tensor, like: Tensor) -> None:
    """Raise unless `ids` is (B, K) int64 with the batch and device of `like`."""
    check_tensor(name, ids, "(B, K)", (torch.int64,))
    check_shape(name, ids, (like.shape[0], ids.shape[1]), "the batch")
    check_same(name, ids, "the input", like, dtype=False)


def check_id_values(name: str, ids: Tensor, units: int) -> None:
    """Raise unless `ids` ascend in [0, units); on the CPU only."""
    if ids.device.type != "cpu":
        return
    low, high = ids.aminmax()
    if low < 0 or high >= units or (ids.diff() <= 0).any():
        raise ValueError(
            f"{name} holds ids from {low} to {high}; each row must ascend, without repetition, "
            f"within [0, {units})"
        )


def check_valid_frames(valid: Tensor | None, frames: Tensor) -> None:
    B, T, _, H, W = frames.shape
    check_valid(valid, {"(B, T)": (B, T), "(B, T, H, W)": (B, T, H, W)}, frames)


def check_unit(unit: int) -> None:
    if not isinstance(unit, int) or unit < 1:
        raise ValueError(f"unit is {unit!r}; it must be an int, a number of pixels, at least 1")


def unit_count(frames: Tensor, unit: int) -> int:
    """Number of units of one sample."""
    T, H, W = frames.shape[1], frames.shape[3], frames.shape[4]
    return T * -(-H // unit) * -(-W // unit)


def _triton(*inputs):
    from timo.kernels import gather_units as kernels

    return kernels.forward(*inputs)


def _triton_backward(*inputs):
    from timo.kernels import gather_units as kernels

    return kernels.backward(*inputs)


def _request(frames, *inputs, dtype=None, **_) -> Request:
    """float64 if either side is: then so is the arithmetic."""
    dtype = next((x for x in inputs if isinstance(x, torch.dtype)), dtype)
    wide = torch.float64 in (frames.dtype, dtype)
    return Request(frames.device, torch.float64 if wide else frames.dtype)


NARROW = (torch.uint8, torch.uint16, *HALF_AND_SINGLE)
UNPROVEN_CUDA = dispatch.BY_CUDA | {"proven": {}}  # neither kernel has a result of a GPU yet
FORWARD = dispatch.register(
    "gather_units",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, RAW),
    Backend(CPP, compiled.forward, ("cpu",), NARROW),
    Backend(TRITON, _triton, dtypes=NARROW, **dispatch.BY_TRITON),
    Backend(CUDA, compiled.forward, dtypes=NARROW, **UNPROVEN_CUDA),
)
BACKWARD = dispatch.register(
    "gather_units_backward",
    _request,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, compiled.backward, ("cpu",), HALF_AND_SINGLE),
    Backend(TRITON, _triton_backward, dtypes=HALF_AND_SINGLE, **dispatch.BY_TRITON),
    Backend(CUDA, compiled.backward, dtypes=HALF_AND_SINGLE, **UNPROVEN_CUDA),
)


def _run(*args):
    *inputs, backend = args
    frames, ids, unit = inputs[0], inputs[1], inputs[5]
    check_id_values("visible_ids", ids, unit_count(frames, unit))
    return FORWARD.select(backend, *inputs).run(*inputs)


def _run_backward(*args):
    *inputs, backend = args
    return BACKWARD.select(backend, *inputs).run(*inputs)


def _fake(frames, ids, scale, offset, valid, unit, before, after, dtype, backend):
    B, K = ids.shape
    size = before + unit + after
    return frames.new_empty((B, K, frames.shape[2], size, size), dtype=dtype)


def _fake_backward(
    grad, ids, scale, valid, dates, height, width, unit, before, after, dtype, backend
):
    shape = (grad.shape[0], dates, grad.shape[2], height, width)
    return grad.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output):
    frames, ids, scale, _, valid, *ctx.options, _, ctx.backend = inputs
    ctx.size, ctx.dtype = (frames.shape[1], *frames.shape[3:]), frames.dtype
    ctx.save_for_backward(ids, scale, valid)


def _backward(ctx, grad):
    frames = torch.ops.timo.gather_units_backward(
        grad, *ctx.saved_tensors, *ctx.size, *ctx.options, ctx.dtype, ctx.backend
    )
    return frames, *[None] * 9


def _save_backward(ctx, inputs, output):
    grad, ids, scale, valid, _, _, _, *ctx.options, _, ctx.backend = inputs
    ctx.dtype = grad.dtype
    ctx.save_for_backward(ids, scale, valid)


def _backward_backward(ctx, grad):
    ids, scale, valid = ctx.saved_tensors
    tiles = torch.ops.timo.gather_units(
        grad, ids, scale, None, valid, *ctx.options, ctx.dtype, ctx.backend
    )
    return tiles, *[None] * 11


define(
    "gather_units(Tensor frames, Tensor visible_ids, Tensor? scale, Tensor? offset, "
    "Tensor? valid, int unit, int before, int after, ScalarType dtype, str backend) -> Tensor",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    "gather_units_backward(Tensor grad, Tensor visible_ids, Tensor? scale, Tensor? valid, "
    "SymInt dates, SymInt height, SymInt width, int unit, int before, int after, "
    "ScalarType dtype, str backend) -> Tensor",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
