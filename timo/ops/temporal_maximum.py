"""Maximum over acquisition dates of enlarged maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timo.ops import dispatch
from timo.ops.checks import FLOATS, HALF_AND_SINGLE, accumulation, check_tensor, check_valid
from timo.ops.compiled import address, launch
from timo.ops.dispatch import CPP, REFERENCE, TRITON, Backend, Request
from timo.ops.library import define

MOST_DATES = 2**15 - 1  # that an int16 tells apart


def temporal_maximum(
    x: Tensor, valid: Tensor | None = None, factor: int = 1, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Maximum over the valid dates of bilinearly enlarged maps, with the date that holds it.

    The temporal pooling of segmentation (specification: model.md §4), where a map has many channels
    at full resolution: no enlarged map but the maximum itself is kept. The gradient goes to the
    date that holds the maximum.

    Args:
        x: (B, T, C, h, w) maps, any floating dtype, any strides; at most 32,767 dates.
        valid: (B, T) or (B, T, h, w) bool, true where usable; all usable if None. An entry of a map
            stands for factor × factor entries of the enlarged one.
        factor: of the enlargement, at least 1; as `interpolate` with align_corners=False. In the
            kernels an entry of weight 0 has no part, not even if it is infinite or NaN.
        backend: "auto", or the backends to choose among (see `timo.ops.explain`).

    Returns:
        values (B, C, factor·h, factor·w) in x's dtype, 0 where no date is valid; and dates, the
        same shape, int16: the earliest that holds the value (in half precision: before rounding),
        -1 where no date is valid. A NaN of a valid date is the maximum. Both lie channels last in
        memory.

    Raises:
        TypeError, ValueError: wrong rank, dtype, empty dimension, shape of `valid` or factor.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("x", x, "(B, T, C, h, w)")
    B, T, _, h, w = x.shape
    check_valid(valid, {"(B, T)": (B, T), "(B, T, h, w)": (B, T, h, w)}, x)
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor is {factor!r}; it must be an integer of at least 1")
    return torch.ops.timo.temporal_maximum(x, valid, factor, backend)


def reference(x: Tensor, valid: Tensor | None, factor: int) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, one date after the other."""
    usable = None if valid is None else spread(valid, factor)

    def map_of(t: int) -> Tensor:
        map_ = enlarge(x[:, t], factor)
        return map_ if usable is None else torch.where(usable[:, t], map_, -torch.inf)

    best = map_of(0)
    dates = torch.zeros_like(best, dtype=torch.int16)
    none = None if usable is None else ~usable.any(1)
    if usable is not None:  # the earliest valid date, in case that no date exceeds -inf
        dates += usable.to(torch.uint8).argmax(1).to(torch.int16)
    for t in range(1, x.shape[1]):
        map_ = map_of(t)
        take = (map_ <= best).logical_not_().logical_and_(best == best)  # or it is the first NaN
        dates.masked_fill_(take, t)
        best = torch.maximum(best, map_)
    if x.shape[1] == factor == 1:
        best = best.clone()  # an output is no view of an input
    if none is not None:
        best, dates = torch.where(none, 0, best), dates.masked_fill(none, -1)
    return channels_last(best), channels_last(dates)


def reference_backward(
    grad: Tensor, dates: Tensor, size: tuple[int, int, int], factor: int
) -> Tensor:
    """Transposed enlargement of the gradient at each date: (B, C, fh, fw) -> (B, T, C, h, w)."""
    T, h, w = size
    wide = grad.new_empty((), dtype=accumulation(grad.dtype))
    rows, columns = (weights(n, factor, wide) for n in (h, w))

    def part(grad: Tensor, dates: Tensor, t: int) -> Tensor:
        """Of a sample and date, (C, h, w)."""
        taken = torch.where(dates == t, grad, 0).to(wide.dtype)
        return (rows.T @ (taken @ columns)).to(grad.dtype)

    parts = [part(g, d, t) for g, d in zip(grad, dates) for t in range(T)]
    return as_maps(torch.stack(parts).unflatten(0, (len(grad), T)))


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling: (M, C, h, w) -> (M, C, factor·h, factor·w)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def weights(size: int, factor: int, like: Tensor) -> Tensor:
    """Of `enlarge` along one dimension, (factor·size, size)."""
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    return unit if factor == 1 else F.interpolate(
        unit[None], scale_factor=factor, mode="linear", align_corners=False
    )[0].T  # fmt: skip


def spread(valid: Tensor, factor: int) -> Tensor:
    """Validity of enlarged maps, (B, T, 1, 1, 1) or (B, T, 1, factor·h, factor·w)."""
    if valid.ndim == 2:
        return valid[:, :, None, None, None]
    return valid[:, :, None].repeat_interleave(factor, 3).repeat_interleave(factor, 4)


def channels_last(x: Tensor) -> Tensor:
    """(M, C, h, w) with channels side by side, whatever the sizes."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def as_maps(x: Tensor) -> Tensor:
    """(B, T, C, h, w) with channels side by side."""
    return channels_last(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _kernel(launch):
    """Forward of a kernel: `launch` fills values and dates from maps, all channels last."""

    def run(x: Tensor, valid: Tensor | None, factor: int) -> tuple[Tensor, Tensor]:
        B, _, C, h, w = x.shape
        values = torch.empty((B, factor * h, factor * w, C), dtype=x.dtype, device=x.device)
        dates = torch.empty(values.shape, dtype=torch.int16, device=x.device)
        if valid is not None and valid.ndim == 2:
            valid = valid[:, :, None, None].expand(*valid.shape, h, w)
        launch(as_maps(x), valid, values, dates, x.shape, factor)
        return values.permute(0, 3, 1, 2), dates.permute(0, 3, 1, 2)

    return run


def _kernel_backward(launch):
    """Backward of a kernel: `launch` writes every element of the maps' gradient."""

    def run(grad: Tensor, dates: Tensor, size: tuple[int, int, int], factor: int) -> Tensor:
        (B, C), (T, h, w) = grad.shape[:2], size
        out = torch.empty((B, T, h, w, C), dtype=grad.dtype, device=grad.device)
        launch(out, channels_last(grad), channels_last(dates), (B, T, C, h, w), factor)
        return out.permute(0, 1, 4, 2, 3)

    return run


def _compiled(maps, valid, values, dates, size, factor):
    pointers = [address(y) for y in (maps, valid, values, dates)]
    strides = [0] * 4 if valid is None else list(valid.stride())
    code = dispatch.dtype_code(maps.dtype)
    launch("temporal_maximum", maps.device, pointers, strides, [*size, factor], code)


def _compiled_backward(maps, grad, dates, size, factor):
    pointers = [address(y) for y in (maps, None, grad, dates)]
    code = dispatch.dtype_code(maps.dtype)
    launch("temporal_maximum_backward", maps.device, pointers, [0] * 4, [*size, factor], code)


def _triton(*arguments):
    from timo.kernels import temporal_maximum as kernels

    kernels.forward(*arguments)


def _triton_backward(*arguments):
    from timo.kernels import temporal_maximum as kernels

    kernels.backward(*arguments)


def _request(x, valid=None, factor=1, **_) -> Request:
    return Request(x.device, x.dtype, dates=x.shape[1])


def _request_backward(grad, dates, size, factor) -> Request:
    return Request(grad.device, grad.dtype, dates=size[0])


FORWARD = dispatch.register(
    "temporal_maximum",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, _kernel(_compiled), ("cpu",), FLOATS),
    Backend(TRITON, _kernel(_triton), dispatch.triton_devices(), HALF_AND_SINGLE),
)
BACKWARD = dispatch.register(
    "temporal_maximum_backward",
    _request_backward,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, _kernel_backward(_compiled_backward), ("cpu",), FLOATS),
    Backend(TRITON, _kernel_backward(_triton_backward), dispatch.triton_devices(), HALF_AND_SINGLE),
)


def _run(x: Tensor, valid: Tensor | None, factor: int, backend: str) -> tuple[Tensor, Tensor]:
    if x.shape[1] > MOST_DATES:  # asked here, a test would bind the dates of an exported graph
        raise ValueError(
            f"x has shape {tuple(x.shape)}; T must be at most {MOST_DATES:,}: take the maximum of "
            "parts of the series, then of these"
        )
    return FORWARD.select(backend, x, valid, factor).run(x, valid, factor)


def _run_backward(
    grad: Tensor, dates: Tensor, size: list[int], factor: int, backend: str
) -> Tensor:
    return BACKWARD.select(backend, grad, dates, size, factor).run(grad, dates, size, factor)


def _fake(x, valid, factor, backend):
    B, _, C, h, w = x.shape
    values = x.new_empty((B, factor * h, factor * w, C)).permute(0, 3, 1, 2)
    return values, torch.empty_like(values, dtype=torch.int16)


def _fake_backward(grad, dates, size, factor, backend):
    (B, C), (T, h, w) = grad.shape[:2], size
    return grad.new_empty((B, T, h, w, C)).permute(0, 1, 4, 2, 3)


def _save(ctx, inputs, output):
    x, _, ctx.factor, ctx.backend = inputs
    ctx.size = (x.shape[1], *x.shape[3:])
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    (dates,) = ctx.saved_tensors
    arguments = grad, dates, ctx.size, ctx.factor, ctx.backend
    return torch.ops.timo.temporal_maximum_backward(*arguments), None, None, None


def _save_backward(ctx, inputs, output):
    _, dates, ctx.size, ctx.factor, _ = inputs
    ctx.save_for_backward(dates)


def _backward_backward(ctx, grad):
    """The backward is linear: of its gradient, what each entry's date has there, enlarged."""
    (dates,) = ctx.saved_tensors
    enlarged = enlarge(grad.flatten(0, 1), ctx.factor).unflatten(0, grad.shape[:2])
    taken = enlarged.gather(1, dates.clamp_min(0).long().unsqueeze(1)).squeeze(1)
    return torch.where(dates >= 0, taken, 0), None, None, None, None


define(
    "temporal_maximum(Tensor x, Tensor? valid, SymInt factor, str backend) -> (Tensor, Tensor)",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    "temporal_maximum_backward(Tensor grad, Tensor dates, SymInt[] size, SymInt factor, "
    "str backend) -> Tensor",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
