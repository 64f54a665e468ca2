"""Loss of the masked autoencoder: squared error against the frames themselves."""

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops import masked_pixel_loss_compiled as compiled
from timo.ops.checks import (
    FLOATS,
    HALF_AND_SINGLE,
    RAW,
    accumulation,
    check_same,
    check_shape,
    check_tensor,
)
from timo.ops.dispatch import CPP, CUDA, REFERENCE, TRITON, Backend, Request
from timo.ops.gather_units import (
    check_id_values,
    check_ids,
    check_unit,
    check_valid_frames,
    per_band,
    physical,
    unit_count,
    valid_pixels,
    windows,
)
from timo.ops.library import define, refuse_third_derivative

NORMS = ("none", "patch", "batch")
EPS = 1e-6  # added to the variance, as in the masked autoencoder (He et al., 2022)


def masked_pixel_loss(
    pred: Tensor,
    frames: Tensor,
    masked_ids: Tensor,
    *,
    scale: Tensor | float | None = None,
    offset: Tensor | float | None = None,
    valid: Tensor | None = None,
    unit: int = 32,
    norm: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Mean squared error over the valid pixels, inside the frame, of the masked units.

    The target is read from the frames, `x * scale + offset`, and normalised (specification:
    model.md, Masked autoencoder): "none"; "patch", by mean and variance of each unit, over its
    valid pixels of all bands; "batch", by one mean and variance of all masked valid pixels.
    Variances are unbiased, and the target is `(y - mean) / sqrt(variance + 1e-6)`.

    Args:
        pred: (B, M, C * unit * unit) predictions, channel-major, any floating dtype.
        frames: (B, T, C, H, W) uint8, uint16 or floating, any strides.
        masked_ids: (B, M) int64, ascending; ids as in `gather_units`. Order and range are checked
            on the CPU only; on a GPU that would make it wait.
        scale, offset: number or (C,) tensor, constants.
        valid: (B, T) or (B, T, H, W) bool, true where usable; all usable if None.
        unit: side of a unit, in pixels.
        norm: "none", "patch" or "batch".
        backend: "auto", or the backends to choose among (see `timo.ops.explain`).

    Returns:
        Scalar float32, float64 for float64 `pred`; 0 where no pixel is valid. Differentiable
        twice in `pred`, which alone gets a gradient.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, ids or norm.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("frames", frames, "(B, T, C, H, W)", RAW)
    check_ids("masked_ids", masked_ids, frames)
    check_unit(unit)
    check_tensor("pred", pred, "(B, M, C * unit * unit)")
    check_shape("pred", pred, (*masked_ids.shape, frames.shape[2] * unit**2), "masked_ids, frames")
    check_same("pred", pred, "frames", frames, dtype=False)
    check_valid_frames(valid, frames)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(NORMS)}")
    wide = pred.dtype == torch.float64
    scale = per_band("scale", scale, frames, wide)
    offset = per_band("offset", offset, frames, wide)
    return torch.ops.timo.masked_pixel_loss(
        pred, frames, masked_ids, scale, offset, valid, unit, norm, backend
    )[0]


def reference(
    pred: Tensor,
    frames: Tensor,
    masked_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch.

    Returns:
        loss (); mean (B, M) and rstd (B, M), what the target of each unit was normalised by; and
        count () int64, the number of values that are averaged.
    """
    target, usable = targets(pred, frames, masked_ids, scale, offset, valid, unit)
    target = torch.where(usable, target, 0)
    sizes = usable.sum(2)  # [B, M]
    if norm == "none":
        mean, rstd = target.new_zeros(sizes.shape), target.new_ones(sizes.shape)
    else:
        dims = (2,) if norm == "patch" else (0, 1, 2)
        n = usable.sum(dims, keepdim=True)
        mean = target.sum(dims, keepdim=True) / n.clamp_min(1)
        spread = torch.where(usable, target - mean, 0).square().sum(dims, keepdim=True)
        rstd = (spread / (n - 1).clamp_min(1) + EPS).rsqrt()
        # Contiguous copies: (1, 1, 1) expands to every unit.
        mean, rstd = (x.squeeze(2).expand(sizes.shape).contiguous() for x in (mean, rstd))
    error = residual(pred, target, usable, mean, rstd)
    count = sizes.sum()
    return error.square().sum() / count.clamp_min(1), mean, rstd, count


def reference_backward(
    grad: Tensor,
    pred: Tensor,
    frames: Tensor,
    masked_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
) -> Tensor:
    """Gradient of the prediction; reads the target from the frames again."""
    target, usable = targets(pred, frames, masked_ids, scale, offset, valid, unit)
    error = residual(pred, target, usable, mean, rstd)
    return (error * (2 * grad / count.clamp_min(1))).to(pred.dtype)


def targets(pred, frames, masked_ids, scale, offset, valid, unit) -> tuple[Tensor, Tensor]:
    """Physical pixels of the masked units and which of them count, both (B, M, C * unit * unit)."""
    wide = pred.dtype == torch.float64
    pixels = windows(frames, masked_ids, unit, 0, 0)
    pixels = physical(pixels, scale, offset, torch.float64 if wide else torch.float32)
    usable = windows(valid_pixels(frames, valid), masked_ids, unit, 0, 0).expand_as(pixels)
    return pixels.flatten(2), usable.flatten(2)


def residual(pred: Tensor, target: Tensor, usable: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Prediction minus normalised target, 0 where a pixel does not count."""
    normalised = (target - mean[..., None]) * rstd[..., None]
    return torch.where(usable, pred.to(target.dtype) - normalised, 0)


def _triton(*inputs):
    from timo.kernels import masked_pixel_loss as kernels

    return kernels.forward(*inputs)


def _triton_backward(*inputs):
    from timo.kernels import masked_pixel_loss as kernels

    return kernels.backward(*inputs)


def _request(pred, frames, *_, **__) -> Request:
    """Of the prediction's dtype, unless the frames are float64."""
    return Request(pred.device, torch.float64 if frames.dtype == torch.float64 else pred.dtype)


def _request_backward(grad, pred, frames, *_, **__) -> Request:
    return _request(pred, frames)


FORWARD = dispatch.register(
    "masked_pixel_loss",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, compiled.forward, ("cpu",), HALF_AND_SINGLE),
    Backend(CUDA, compiled.forward, dtypes=HALF_AND_SINGLE, **dispatch.BY_CUDA),
    # Preferred: 1.1 and 0.8 ms forward and backward where the one before takes 2.8 and 1.0 (H200).
    Backend(TRITON, _triton, dtypes=HALF_AND_SINGLE, **dispatch.BY_TRITON),
)
BACKWARD = dispatch.register(
    "masked_pixel_loss_backward",
    _request_backward,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, compiled.backward, ("cpu",), HALF_AND_SINGLE),
    Backend(CUDA, compiled.backward, dtypes=HALF_AND_SINGLE, **dispatch.BY_CUDA),
    Backend(TRITON, _triton_backward, dtypes=HALF_AND_SINGLE, **dispatch.BY_TRITON),
)


def _run(*args):
    *inputs, backend = args
    frames, ids, unit = inputs[1], inputs[2], inputs[6]
    check_id_values("masked_ids", ids, unit_count(frames, unit))
    return FORWARD.select(backend, *inputs).run(*inputs)


def _run_backward(*args):
    *inputs, backend = args
    return BACKWARD.select(backend, *inputs).run(*inputs)


def _fake(pred, frames, ids, scale, offset, valid, unit, norm, backend):
    dtype = accumulation(pred.dtype)
    return (
        pred.new_empty((), dtype=dtype),
        pred.new_empty(ids.shape, dtype=dtype),
        pred.new_empty(ids.shape, dtype=dtype),
        pred.new_empty((), dtype=torch.int64),
    )


def _fake_backward(grad, pred, *_):
    return pred.new_empty(pred.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.unit, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    *tensors, mean, rstd, count = ctx.saved_tensors
    pred = torch.ops.timo.masked_pixel_loss_backward(
        grad, *tensors, ctx.unit, mean, rstd, count, ctx.backend
    )
    return pred, *[None] * 8


def _save_backward(ctx, inputs, output):
    *tensors, ctx.unit, mean, rstd, count, _ = inputs
    ctx.save_for_backward(*tensors, mean, rstd, count)


def _backward_backward(ctx, grad):
    refuse_third_derivative("masked_pixel_loss")
    first, pred, *tensors, mean, rstd, count = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (first, pred)]
        out = reference_backward(*inputs, *tensors, ctx.unit, mean, rstd, count)
        grads = torch.autograd.grad(out, inputs, grad)
    return *grads, *[None] * 10


TENSORS = (
    "Tensor pred, Tensor frames, Tensor masked_ids, Tensor? scale, Tensor? offset, Tensor? valid"
)
define(
    f"masked_pixel_loss({TENSORS}, int unit, str norm, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    f"masked_pixel_loss_backward(Tensor grad, {TENSORS}, int unit, Tensor mean, Tensor rstd, "
    "Tensor count, str backend) -> Tensor",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
