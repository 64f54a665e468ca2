"""Decoder input: visible latents at their places, the mask token elsewhere, plus position."""

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops import scatter_units_compiled as compiled
from timo.ops.checks import (
    FLOATS,
    HALF_AND_SINGLE,
    accumulation,
    check_same,
    check_shape,
    check_tensor,
)
from timo.ops.dispatch import CPP, CUDA, REFERENCE, TRITON, Backend, Request
from timo.ops.gather_units import check_id_values, check_ids
from timo.ops.library import define


def scatter_units(
    tokens: Tensor,
    visible_ids: Tensor,
    mask_token: Tensor,
    position: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Put visible tokens at their places among mask tokens and add the positional code.

    The input of the masked autoencoder's decoder (specification: model.md, Masked autoencoder;
    units.md, The other half).

    Args:
        tokens: (B, K, D) latents of the visible units, any floating dtype.
        visible_ids: (B, K) int64, ascending, in [0, units). Order and range are checked on the
            CPU only; on a GPU that would make it wait.
        mask_token: (D,), any floating dtype.
        position: (units, D), any floating dtype; units is T * h * w.
        backend: "auto", or the backends to choose among (see `timo.ops.explain`).

    Returns:
        (B, units, D) in the dtype of `tokens`; sums are float32 (float64 for float64).
        Differentiable in tokens, mask_token and position.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or ids.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("tokens", tokens, "(B, K, D)")
    check_ids("visible_ids", visible_ids, tokens)
    check_shape("visible_ids", visible_ids, tokens.shape[:2], "tokens")
    check_tensor("mask_token", mask_token, "(D,)")
    check_shape("mask_token", mask_token, tokens.shape[2:], "tokens")
    check_same("mask_token", mask_token, "tokens", tokens, dtype=False)
    check_tensor("position", position, "(units, D)")
    check_shape("position", position, (position.shape[0], tokens.shape[2]), "tokens")
    check_same("position", position, "tokens", tokens, dtype=False)
    return torch.ops.timo.scatter_units(tokens, visible_ids, mask_token, position, backend)


def reference(tokens: Tensor, visible_ids: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    """Plain PyTorch."""
    B, K, D = tokens.shape
    dtype = accumulation(tokens.dtype)
    sequence = mask_token.to(dtype).expand(B, position.shape[0], D)
    index = visible_ids[..., None].expand(B, K, D)
    return (sequence.scatter(1, index, tokens.to(dtype)) + position).to(tokens.dtype)


def reference_backward(
    grad: Tensor, visible_ids: Tensor, mask_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens (B, K, D) and of the mask token (D,)."""
    dtype = accumulation(grad.dtype)
    index = visible_ids[..., None].expand(-1, -1, grad.shape[2])
    masked = grad.to(dtype).scatter(1, index, 0).sum((0, 1))
    return grad.gather(1, index), masked.to(mask_dtype)


def _triton(*inputs):
    from timo.kernels import scatter_units as kernels

    return kernels.forward(*inputs)


def _triton_backward(*inputs):
    from timo.kernels import scatter_units as kernels

    return kernels.backward(*inputs)


def _request(tokens, visible_ids, mask_token, position, **_) -> Request:
    return _widest(tokens, mask_token.dtype, position.dtype)


def _request_backward(grad, ids, mask_dtype) -> Request:
    return _widest(grad, mask_dtype)


def _widest(x: Tensor, *others: torch.dtype) -> Request:
    """Of the sequence's dtype, unless float64 parameters ask for float64 sums."""
    return Request(x.device, torch.float64 if torch.float64 in others else x.dtype)


FORWARD = dispatch.register(
    "scatter_units",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, compiled.forward, ("cpu",), HALF_AND_SINGLE),
    Backend(TRITON, _triton, dtypes=HALF_AND_SINGLE, **dispatch.BY_TRITON),
    Backend(CUDA, compiled.forward, dtypes=HALF_AND_SINGLE, **dispatch.BY_CUDA),
)
BACKWARD = dispatch.register(
    "scatter_units_backward",
    _request_backward,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, compiled.backward, ("cpu",), HALF_AND_SINGLE),
    Backend(TRITON, _triton_backward, dtypes=HALF_AND_SINGLE, **dispatch.BY_TRITON),
    Backend(CUDA, compiled.backward, dtypes=HALF_AND_SINGLE, **dispatch.BY_CUDA),
)


def _run(tokens, ids, mask_token, position, backend):
    check_id_values("visible_ids", ids, position.shape[0])
    run = FORWARD.select(backend, tokens, ids, mask_token, position).run
    return run(tokens, ids, mask_token, position)


def _run_backward(grad, ids, mask_dtype, backend):
    return BACKWARD.select(backend, grad, ids, mask_dtype).run(grad, ids, mask_dtype)


def _fake(tokens, ids, mask_token, position, backend):
    return tokens.new_empty((tokens.shape[0], *position.shape))


def _fake_backward(grad, ids, mask_dtype, backend):
    return grad.new_empty((*ids.shape, grad.shape[2])), grad.new_empty(
        (grad.shape[2],), dtype=mask_dtype
    )


def _save(ctx, inputs, output):
    _, ids, mask_token, position, ctx.backend = inputs
    ctx.mask_dtype, ctx.position_dtype = mask_token.dtype, position.dtype
    ctx.save_for_backward(ids)


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    tokens, mask_token = torch.ops.timo.scatter_units_backward(
        grad, ids, ctx.mask_dtype, ctx.backend
    )
    position = None
    if ctx.needs_input_grad[3]:
        wide = accumulation(torch.promote_types(grad.dtype, ctx.position_dtype))
        position = grad.sum(0, dtype=wide).to(ctx.position_dtype)
    return tokens, None, mask_token, position, None


def _save_backward(ctx, inputs, output):
    grad, ids, _, ctx.backend = inputs
    ctx.units = grad.shape[1]
    ctx.save_for_backward(ids)


def _backward_backward(ctx, tokens, mask_token):
    (ids,) = ctx.saved_tensors
    position = tokens.new_zeros((ctx.units, tokens.shape[2]))
    grad = torch.ops.timo.scatter_units(tokens, ids, mask_token, position, ctx.backend)
    return grad, None, None, None


define(
    "scatter_units(Tensor tokens, Tensor visible_ids, Tensor mask_token, Tensor position, "
    "str backend) -> Tensor",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    "scatter_units_backward(Tensor grad, Tensor visible_ids, ScalarType mask_dtype, str backend) "
    "-> (Tensor, Tensor)",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
