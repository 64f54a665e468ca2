"""Lower median over acquisition dates, and how far each date lies from it along one direction."""

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops.checks import (
    FLOATS,
    HALF_AND_SINGLE,
    accumulation,
    check_same,
    check_shape,
    check_tensor,
    check_valid,
)
from timo.ops.compiled import launch
from timo.ops.dispatch import CPP, REFERENCE, TRITON, Backend, Request
from timo.ops.library import define, refuse_third_derivative
from timo.ops.temporal_median import addresses, spread
from timo.ops.temporal_median import reference as median_reference
from timo.ops.temporal_median import reference_backward as median_reference_backward


def median_deviation(
    q: Tensor, weight: Tensor, valid: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower median over the valid dates, and every date's projected deviation from it.

    The query medians of gyroscope attention and what its gate is the normalisation of
    (specification: gyroscope.md, Definition): `weight · (q[t, n, h] - values[n, h])`. One pass over
    `q`; memory beyond the results is that of a few positions, backward 4 D bytes more for each 16.

    Args:
        q: (B, T, N, H, D) values, any floating dtype, any strides.
        weight: (D,) direction, any floating dtype.
        valid: (B, T) or (B, T, N) bool, true where usable; all usable if None.
        backend: "auto", or the backends to choose among (see `timo.ops.explain`).

    Returns:
        values (B, N, H, D) and indices (B, N, H, D) as `temporal_median` gives them; and deviation
        (B, T, N, H), float32, or float64 for float64 `q`, 0 at invalid entries. Values and
        deviation are differentiable twice, in `q` and `weight`.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or empty dimension.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("q", q, "(B, T, N, H, D)")
    check_tensor("weight", weight, "(D,)")
    check_shape("weight", weight, q.shape[4:], "q")
    check_same("weight", weight, "q", q, dtype=False)
    check_valid(valid, {"(B, T)": q.shape[:2], "(B, T, N)": q.shape[:3]}, q)
    return torch.ops.timo.median_deviation(q, weight, valid, backend)


def reference(q: Tensor, weight: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch."""
    values, indices = median_reference(q, valid)
    difference = deviations(q, values, valid)
    return values, indices, (difference * weight.to(difference.dtype)).sum(-1)


def reference_backward(
    dvalues: Tensor,
    ddeviation: Tensor,
    q: Tensor,
    weight: Tensor,
    valid: Tensor | None,
    values: Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and weight; a median moves the deviations of all dates."""
    usable, dtype = spread(valid, q), accumulation(q.dtype)
    grad = torch.where(usable, ddeviation[..., None].to(dtype), 0)  # [B, T, N, H, 1]
    direction = weight.to(dtype)
    rest = dvalues.to(dtype) - direction * grad.sum(1)  # [B, N, H, D]
    dq = direction * grad + median_reference_backward(rest, indices, q.shape[1])
    dweight = (grad * deviations(q, values, valid)).sum((0, 1, 2, 3))
    return torch.where(usable, dq, 0).to(q.dtype).contiguous(), dweight.to(weight.dtype)


def deviations(q: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
    """q minus its median in the dtype of sums, 0 where not valid: (B, T, N, H, D)."""
    dtype = accumulation(q.dtype)
    return torch.where(spread(valid, q), q.to(dtype) - values.to(dtype).unsqueeze(1), 0)


def _forward(kernel):
    """Forward of a compiled backend: `kernel` fills the results from strided views."""

    def run(q: Tensor, weight: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, weight, usable = _views(q, weight, valid)
        B, T, N, H, D = q.shape
        values = torch.empty((B, N, H, D), dtype=q.dtype, device=q.device)
        indices = torch.empty((B, N, H, D), dtype=torch.int64, device=q.device)
        deviation = torch.empty((B, T, N, H), dtype=weight.dtype, device=q.device)
        kernel(q, weight, usable, values, indices, deviation)
        return values, indices, deviation

    return run


def _backward_of(kernel):
    """Backward of a compiled backend: `kernel` writes dq and returns the gradient of the weight."""

    def run(dvalues, ddeviation, q, weight, valid, values, indices) -> tuple[Tensor, Tensor]:
        dtype = weight.dtype
        q, weight, usable = _views(q, weight, valid)
        saved = [x.contiguous() for x in (values, indices, dvalues, ddeviation)]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return dq, kernel(q, weight, usable, *saved, dq).to(dtype)

    return run


def _views(q: Tensor, weight: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Channels side by side, the weight in the dtype of sums, validity (B, T, N)."""
    usable = None if valid is None else spread(valid, q)[..., 0, 0]
    if q.stride(4) != 1:
        q = q.contiguous()
    return q, weight.to(accumulation(q.dtype)).contiguous(), usable


def _cpp(q, weight, usable, values, indices, deviation):
    others = [weight.data_ptr(), deviation.data_ptr(), 0, 0, 0, 0]
    launch("median_deviation", q.device, *addresses(q, usable, values, indices), others)


def _cpp_backward(q, weight, usable, values, indices, dvalues, ddeviation, dq):
    B, _, N, _, D = q.shape
    chunks = -(-B * N // dispatch.compiled().median_deviation_chunk)
    partial = torch.empty((chunks, D), dtype=weight.dtype)
    dweight = torch.empty((D,), dtype=weight.dtype)
    others = [x.data_ptr() for x in (weight, ddeviation, dvalues, dq, dweight, partial)]
    launch("median_deviation_backward", q.device, *addresses(q, usable, values, indices), others)
    return dweight


def _triton(*arguments):
    from timo.kernels import median_deviation as kernels

    kernels.forward(*arguments)


def _triton_backward(*arguments):
    from timo.kernels import median_deviation as kernels

    return kernels.backward(*arguments)


def _request(q, weight, valid=None, **_) -> Request:
    return Request(q.device, q.dtype, dates=q.shape[1], head_dim=q.shape[4])


def _request_backward(dvalues, ddeviation, q, weight, *_) -> Request:
    return _request(q, weight)


TRITON_LIMITS = {
    **dispatch.BY_TRITON,
    "dtypes": HALF_AND_SINGLE,
    "max_dates": 64,
    "head_dims": (1, 128),
}
FORWARD = dispatch.register(
    "median_deviation",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, _forward(_cpp), ("cpu",), FLOATS),
    Backend(TRITON, _forward(_triton), **TRITON_LIMITS),
)
BACKWARD = dispatch.register(
    "median_deviation_backward",
    _request_backward,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, _backward_of(_cpp_backward), ("cpu",), FLOATS),
    Backend(TRITON, _backward_of(_triton_backward), **TRITON_LIMITS),
)


def _run(*args):
    *inputs, backend = args
    return FORWARD.select(backend, *inputs).run(*inputs)


def _run_backward(*args):
    *inputs, backend = args
    return BACKWARD.select(backend, *inputs).run(*inputs)


def _fake(q, weight, valid, backend):
    B, T, N, H, D = q.shape
    return (
        q.new_empty((B, N, H, D)),
        q.new_empty((B, N, H, D), dtype=torch.int64),
        q.new_empty((B, T, N, H), dtype=accumulation(q.dtype)),
    )


def _fake_backward(dvalues, ddeviation, q, weight, *_):
    return q.new_empty(q.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dvalues, _, ddeviation):
    grads = torch.ops.timo.median_deviation_backward(
        dvalues, ddeviation, *ctx.saved_tensors, ctx.backend
    )
    return *grads, None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1])


def _backward_backward(ctx, *grads):
    refuse_third_derivative("median_deviation")
    *tensors, valid, values, indices = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (*tensors, values)]
        first = reference_backward(*inputs[:4], valid, inputs[4], indices)
        *second, dvalues = torch.autograd.grad(first, inputs, grads)
    return *second, None, dvalues, None, None


define(
    "median_deviation(Tensor q, Tensor weight, Tensor? valid, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    "median_deviation_backward(Tensor dvalues, Tensor ddeviation, Tensor q, Tensor weight, "
    "Tensor? valid, Tensor values, Tensor indices, str backend) -> (Tensor, Tensor)",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
