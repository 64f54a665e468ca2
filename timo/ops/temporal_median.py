"""Lower median over acquisition dates, per channel."""

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops.checks import FLOATS, HALF_AND_SINGLE, check_tensor, check_valid
from timo.ops.compiled import launch
from timo.ops.dispatch import CPP, CUDA, REFERENCE, TRITON, Backend, Request
from timo.ops.library import define


def temporal_median(
    x: Tensor, valid: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Lower median over the valid dates of every channel, with the date that holds it.

    The query and key medians of gyroscope attention (specification: gyroscope.md, Definition).
    Of an even count the lower middle value is taken. The gradient goes to the selected date.

    Args:
        x: (B, T, N, H, D) values, any floating dtype, any strides.
        valid: (B, T) or (B, T, N) bool, true where usable; all usable if None.
        backend: "auto", or the backends to choose among (see `timo.ops.explain`).

    Returns:
        values (B, N, H, D) in x's dtype, 0 where no date is valid; and indices (B, N, H, D)
        int64, the lowest date that holds the value, -1 where no date is valid. A NaN among the
        valid dates is returned itself, as `torch.median` does.

    Raises:
        TypeError, ValueError: wrong rank, dtype, empty dimension or shape of `valid`.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("x", x, "(B, T, N, H, D)")
    check_valid(valid, {"(B, T)": x.shape[:2], "(B, T, N)": x.shape[:3]}, x)
    return torch.ops.timo.temporal_median(x, valid, backend)


def reference(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: sort, take the middle of the valid ones, find its first date."""
    usable = spread(valid, x)  # [B, T, N, 1, 1]
    count = usable.sum(1, keepdim=True)  # [B, 1, N, 1, 1]
    # Invalid dates sort behind the valid ones, where the lower median never reaches.
    ranked = torch.where(usable, x, torch.inf).sort(1).values
    middle = ((count - 1) // 2).clamp_min(0).expand(-1, 1, -1, *x.shape[3:])
    value = ranked.gather(1, middle)  # [B, 1, N, H, D]
    nan = usable & x.isnan()
    value = torch.where(nan.any(1, keepdim=True), torch.nan, value)
    holds = usable & ((x == value) | (nan & value.isnan()))
    index = holds.to(torch.uint8).argmax(1, keepdim=True)  # the first date of several
    chosen = torch.where(count > 0, x.gather(1, index), 0)
    return chosen.squeeze(1), torch.where(count > 0, index, -1).squeeze(1)


def reference_backward(grad: Tensor, indices: Tensor, dates: int) -> Tensor:
    """`grad` at the selected dates, 0 elsewhere: (B, N, H, D) -> (B, T, N, H, D)."""
    date = torch.arange(dates, device=grad.device).view(1, -1, 1, 1, 1)
    return torch.where(indices.unsqueeze(1) == date, grad.unsqueeze(1), 0).contiguous()


def spread(valid: Tensor | None, x: Tensor) -> Tensor:
    """Validity as a view (B, T, N, 1, 1), whatever was given."""
    B, T, N = x.shape[:3]
    if valid is None:
        valid = torch.ones((), dtype=torch.bool, device=x.device).expand(B, T, N)
    elif valid.ndim == 2:
        valid = valid[:, :, None].expand(B, T, N)
    return valid[:, :, :, None, None]


def _kernel(launch):
    """Forward of a compiled backend: `launch` fills values and indices from strided views."""

    def run(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.stride(4) != 1:
            x = x.contiguous()
        B, T, N, H, D = x.shape
        values = torch.empty((B, N, H, D), dtype=x.dtype, device=x.device)
        indices = torch.empty((B, N, H, D), dtype=torch.int64, device=x.device)
        usable = None if valid is None else spread(valid, x)[..., 0, 0]
        launch(x, usable, values, indices)
        return values, indices

    return run


def _kernel_backward(launch):
    """Backward of a compiled backend: `launch` writes every element of the gradient."""

    def run(grad: Tensor, indices: Tensor, dates: int) -> Tensor:
        B, N, H, D = grad.shape
        out = torch.empty((B, dates, N, H, D), dtype=grad.dtype, device=grad.device)
        launch(grad.contiguous(), indices.contiguous(), out)
        return out

    return run


def _compiled(x, usable, values, indices):
    launch("temporal_median", x.device, *addresses(x, usable, values, indices))


def _compiled_backward(grad, indices, out):
    B, T = out.shape[:2]
    launch(
        "temporal_median_backward", grad.device, grad.data_ptr(), indices.data_ptr(),
        out.data_ptr(), out.element_size(), B, T, grad[0].numel(),
    )  # fmt: skip


def addresses(x: Tensor, usable: Tensor | None, values: Tensor, indices: Tensor) -> tuple:
    """Arguments of the compiled kernels: `MedianArgs` of csrc/ops.h and the dtype."""
    return (
        x.data_ptr(), list(x.stride()[:4]), dispatch.dtype_code(x.dtype),
        0 if usable is None else usable.data_ptr(),
        [0, 0, 0] if usable is None else list(usable.stride()),
        values.data_ptr(), indices.data_ptr(), list(x.shape),
    )  # fmt: skip


def _triton(x, usable, values, indices):
    from timo.kernels import temporal_median as kernels

    kernels.forward(x, usable, values, indices)


def _triton_backward(grad, indices, out):
    from timo.kernels import temporal_median as kernels

    kernels.backward(grad, indices, out)


def _request(x, valid=None, **_) -> Request:
    return Request(x.device, x.dtype, dates=x.shape[1])


def _request_backward(grad, indices, dates) -> Request:
    return Request(grad.device, grad.dtype, dates=dates)


FORWARD = dispatch.register(
    "temporal_median",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, _kernel(_compiled), ("cpu",), FLOATS),
    Backend(TRITON, _kernel(_triton), dtypes=HALF_AND_SINGLE, max_dates=256, **dispatch.BY_TRITON),
    Backend(CUDA, _kernel(_compiled), dtypes=FLOATS, max_dates=192, **dispatch.BY_CUDA),
)
BACKWARD = dispatch.register(
    "temporal_median_backward",
    _request_backward,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, _kernel_backward(_compiled_backward), ("cpu",), FLOATS),
    Backend(
        TRITON, _kernel_backward(_triton_backward), dtypes=HALF_AND_SINGLE, **dispatch.BY_TRITON
    ),
    Backend(CUDA, _kernel_backward(_compiled_backward), dtypes=FLOATS, **dispatch.BY_CUDA),
)


def _run(x: Tensor, valid: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return FORWARD.select(backend, x, valid).run(x, valid)


def _run_backward(grad: Tensor, indices: Tensor, dates: int, backend: str) -> Tensor:
    return BACKWARD.select(backend, grad, indices, dates).run(grad, indices, dates)


def _fake(x, valid, backend):
    shape = (x.shape[0], *x.shape[2:])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _fake_backward(grad, indices, dates, backend):
    return grad.new_empty((grad.shape[0], dates, *grad.shape[1:]))


def _save(ctx, inputs, output):
    ctx.dates, ctx.backend = inputs[0].shape[1], inputs[2]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    (indices,) = ctx.saved_tensors
    return (
        torch.ops.timo.temporal_median_backward(grad, indices, ctx.dates, ctx.backend),
        None,
        None,
    )


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward_backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    taken = grad.gather(1, indices.clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where(indices >= 0, taken, 0), None, None, None


define(
    "temporal_median(Tensor x, Tensor? valid, str backend) -> (Tensor, Tensor)",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    "temporal_median_backward(Tensor grad, Tensor indices, SymInt dates, str backend) -> Tensor",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
