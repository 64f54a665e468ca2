"""Spatiotemporal gyroscope attention: one spatial score matrix for all acquisition dates."""

import math
from collections.abc import Iterator
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from timo.ops import dispatch, gyroscope_cpp
from timo.ops.checks import (
    FLOATS,
    HALF_AND_SINGLE,
    accumulation,
    check_same,
    check_shape,
    check_tensor,
    check_valid,
)
from timo.ops.dispatch import CPP, REFERENCE, TRITON, TRITON_ATOMIC, Backend, Request
from timo.ops.library import define, refuse_third_derivative

# Elements of one block of energies in the reference. Its workspace is at most five such blocks in
# the accumulation dtype (20 MiB in float32), beside the values of the heads in hand and their
# gradient (each heads * N * T * D elements, a single head as soon as N * N exceeds a block).
BLOCK = 2**20
BITS = math.log2(math.e)  # e ** x is 2 ** (BITS * x)


def gyroscope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None = None,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention over the other dates of a position and, gated, over all positions of a date.

    Query (t, n) has the temporal energies `scale * q[t, n] . k[s, n]` of the other dates s and
    the spatial energies `scale * q_median[n] . k_median[m] + gate[t, n]` of all positions m, in
    one softmax (specification: gyroscope.md, Definition; TiMo, arXiv 2505.08723, spatiotemporal
    gyroscope attention). Spatial energies are computed once for all dates (Factored form).

    Args:
        q, k, v: (B, T, N, H, D), one floating dtype, any strides.
        q_median, k_median: (B, N, H, D) in q's dtype, as `temporal_median` gives them.
        gate: (B, T, N, H), any floating dtype.
        valid: (B, T) or (B, T, N) bool, true where usable; all usable if None. Only valid
            entries serve as keys and values; whatever the others hold is never read into a result.
        scale: factor of all products of queries and keys; the published model has 1.
        backend: "auto", or the backends to choose among (see `timo.ops.explain`). With
            "triton_atomic" backward adds up the gradient of k_median in any order, for
            2T + 4 products of N x N x D instead of 3T + 5.

    Returns:
        (B, T, N, H, D) in q's dtype, exactly 0 at invalid queries. Differentiable twice in
        q, k, v, q_median, k_median and gate; sums are float32 (float64 for float64).

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype or device of an argument.
        RuntimeError: no backend can run the request; gives each one's reason.
    """
    check_tensor("q", q, "(B, T, N, H, D)")
    B, T, N, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, "(B, T, N, H, D)")
        check_shape(name, x, q.shape, "q")
        check_same(name, x, "q", q)
    for name, x in (("q_median", q_median), ("k_median", k_median)):
        check_tensor(name, x, "(B, N, H, D)")
        check_shape(name, x, (B, N, H, D), "q")
        check_same(name, x, "q", q)
    check_tensor("gate", gate, "(B, T, N, H)")
    check_shape("gate", gate, (B, T, N, H), "q")
    check_same("gate", gate, "q", q, dtype=False)
    check_valid(valid, {"(B, T)": (B, T), "(B, T, N)": (B, T, N)}, q)
    if not isinstance(scale, Real):
        raise TypeError(f"scale is {type(scale).__name__}; it must be a number")
    out, _, _ = torch.ops.timo.gyroscope_attention(
        q, k, v, q_median, k_median, gate, valid, float(scale), backend
    )
    return out


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, blocked over queries; differentiable any number of times.

    Returns:
        out (B, T, N, H, D); lse (B, T, N, H), base-2 logarithm of the sum of all exponentials
        of a query; and spatial_lse (B, N, H), the same over the spatial energies without the gate,
        of positions valid on any date. Both are +inf where the query (the position on every date)
        is invalid. Base 2 because exponentials are powers of two wherever they are fast: every
        conversion would cost a rounding, which counts where energies are in the hundreds.
    """
    B, T, N, H, _ = q.shape
    dtype = accumulation(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, N, H), dtype=dtype, device=q.device)
    spatial_lse = torch.empty((B, N, H), dtype=dtype, device=q.device)
    for b, heads, blocks in tiles(q):
        usable, bars = validity(valid, b, N, dtype)
        values = dates_inside(v[b, :, :, heads], usable, dtype).contiguous()  # [g, N, T, D]
        keys = medians(k_median[b, :, heads], usable, dtype)  # [g, N, D]
        for rows in blocks:
            live = None if usable is None else usable[:, rows]
            query = medians(q_median[b, rows, heads], live, dtype)
            date_query = dates_inside(q[b, :, rows, heads], live, dtype)  # [g, R, T, D]
            date_key = dates_inside(k[b, :, rows, heads], live, dtype)
            gates = dates_inside(gate[b, :, rows, heads, None], live, dtype).squeeze(-1) * BITS

            energies = torch.bmm(query * (scale * BITS), keys.mT)  # [g, R, N]
            if bars is None:
                top, mass, spatial = spatial_sums(energies, values)
                total = top + mass.detach().log2()
            else:
                # Every date has its own maximum: a shared one, held by a position which a date
                # cannot use, may lie so far above that all weights of that date underflow.
                dates = [spatial_sums(energies + bars[t], values[:, :, t, None]) for t in range(T)]
                top, mass, spatial = (torch.cat(x, d) for x, d in zip(zip(*dates), (-1, -1, -2)))
                total = spatial_sums(
                    energies.detach() + bars.amax(0), values[:, :, 0, None].detach()
                )
                total = total[0] + total[1].log2()
            # One softmax: both parts are rescaled to the greater of their greatest energies.
            # A shift of all energies changes no result, so the maxima are not differentiated.
            temporal = temporal_energies(date_query, date_key, live, scale)  # [g, R, T, T]
            greatest = torch.maximum(top + gates, temporal.amax(-1)).detach()
            weights = exp2(temporal - greatest[..., None])
            share = exp2(top + gates - greatest)
            denominator = share * mass + weights.sum(-1)  # [g, R, T], at least 1
            result = share[..., None] * spatial + weights @ values[:, rows]
            result = result / denominator[..., None]
            logs = greatest + denominator.detach().log2()
            if live is not None:
                result = torch.where(live.mT[..., None], result, 0)
                logs = torch.where(live.mT, logs, torch.inf)
                total = torch.where(live.any(0)[:, None], total, torch.inf)
            out[b, :, rows, heads] = result.permute(2, 1, 0, 3)
            lse[b, :, rows, heads] = logs.permute(2, 1, 0)
            spatial_lse[b, rows, heads] = total.squeeze(-1).mT
    return out, lse, spatial_lse


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    spatial_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, q_median, k_median and gate; recomputes the weights (gyroscope.md)."""
    T, N = q.shape[1:3]
    dtype = accumulation(q.dtype)
    inputs = q, k, v, q_median, k_median, gate
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    dq, dk, dv, dq_median, dk_median, dgate = results
    for b, heads, blocks in tiles(q):
        usable, bars = validity(valid, b, N, dtype)
        values = dates_inside(v[b, :, :, heads], usable, dtype).contiguous()  # [g, N, T, D]
        keys = medians(k_median[b, :, heads], usable, dtype)  # [g, N, D]
        dvalues, dkeys = torch.zeros_like(values), torch.zeros_like(keys)
        for rows in blocks:
            live = None if usable is None else usable[:, rows]
            query = medians(q_median[b, rows, heads], live, dtype)
            date_query = dates_inside(q[b, :, rows, heads], live, dtype)  # [g, R, T, D]
            date_key = dates_inside(k[b, :, rows, heads], live, dtype)
            gates = dates_inside(gate[b, :, rows, heads, None], live, dtype).squeeze(-1) * BITS
            logs = lse[b, :, rows, heads].permute(2, 1, 0)  # [g, R, T]
            dout = dates_inside(grad[b, :, rows, heads], live, dtype)
            delta = (dout * dates_inside(out[b, :, rows, heads], live, dtype)).sum(-1)

            temporal = temporal_energies(date_query, date_key, live, scale)  # [g, R, T, T]
            weights = exp2(temporal - logs[..., None])
            dtemporal = weights * (dout @ values[:, rows].mT - delta[..., None])
            dvalues[:, rows] += weights.mT @ dout
            dq[b, :, rows, heads] = (scale * dtemporal @ date_key).permute(2, 1, 0, 3)
            dk[b, :, rows, heads] = (scale * dtemporal.mT @ date_query).permute(2, 1, 0, 3)
            # The score gradients of one softmax sum to zero, and the gate moves all spatial ones.
            dgate[b, :, rows, heads] = -dtemporal.sum(-1).permute(2, 1, 0)

            energies = torch.bmm(query * (scale * BITS), keys.mT)  # [g, R, N]
            if bars is None:
                total = spatial_lse[b, rows, heads].mT[..., None]  # [g, R, 1]
                share = exp2(total + gates - logs)  # [g, R, T], at most 1
                if live is not None:
                    share = torch.where(live.mT, share, 0)
                denergies = spatial_gradient(
                    energies.sub_(total),
                    (share[..., None] * dout).flatten(2),
                    (share * delta).sum(-1, keepdim=True),
                    values.flatten(2),
                    dvalues.flatten(2),
                )
            else:
                denergies = torch.zeros_like(energies)
                for t in range(T):
                    denergies += spatial_gradient(
                        (energies + bars[t]).sub_((logs - gates)[..., [t]]),
                        dout[:, :, t],
                        delta[..., [t]],
                        values[:, :, t],
                        dvalues[:, :, t],
                    )
            dq_median[b, rows, heads] = (scale * torch.bmm(denergies, keys)).transpose(0, 1)
            dkeys.baddbmm_(denergies.mT, query, alpha=scale)
        dv[b, :, :, heads] = dvalues.permute(2, 1, 0, 3)
        dk_median[b, :, heads] = dkeys.transpose(0, 1)
    return tuple(results)


def spatial_sums(energies: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every date with the same weights: (g, R, N), (g, N, T, D).

    Returns:
        greatest energy (g, R, 1), sum of weights (g, R, 1), weighted values (g, R, T, D); weights
        are relative to the greatest. `energies` is overwritten.
    """
    top = energies.detach().amax(-1, keepdim=True)
    weights = exp2(energies.sub_(top))
    weighted = torch.bmm(weights, values.flatten(2)).unflatten(-1, values.shape[2:])
    return top, weights.sum(-1, keepdim=True), weighted


def spatial_gradient(
    logs: Tensor, dout: Tensor, delta: Tensor, values: Tensor, dvalues: Tensor
) -> Tensor:
    """Gradient of the energies (g, R, N) of weights `exp2(logs)`; adds to `dvalues` (g, N, W).

    `dout` (g, R, W) is the gradient of the weighted `values` (g, N, W), `delta` (g, R, 1) its
    product with the output.
    """
    weights = exp2(logs)
    dvalues.baddbmm_(weights.mT, dout)
    return torch.bmm(dout, values.mT).sub_(delta).mul_(weights)


def temporal_energies(q: Tensor, k: Tensor, usable: Tensor | None, scale: float) -> Tensor:
    """Energies in bits of the other valid dates of a position: (g, R, T, D) -> (g, R, T, T)."""
    barred = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    if usable is not None:
        barred = barred | ~usable.mT[:, None, :]  # [R, T, T]
    return (scale * BITS * q @ k.mT).masked_fill(barred, torch.finfo(q.dtype).min)


def exp2(x: Tensor) -> Tensor:
    """2 ** x, but 0 below 2 ** -100.

    Of a sum that is at least 1 this drops nothing that counts. Denormal numbers, which energies
    that differ by hundreds lead to, make exponentials and matrix products on CPUs slower by
    factors of ten to fifty.
    """
    return F.threshold(x, -100, -torch.inf).exp2_()


def dates_inside(x: Tensor, usable: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(T, n, g, D) view of a sample's heads -> (g, n, T, D) in `dtype`, 0 where not usable."""
    x = x.permute(2, 1, 0, 3).to(dtype)
    return x if usable is None else torch.where(usable.mT[..., None], x, 0)


def medians(x: Tensor, usable: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(n, g, D) -> (g, n, D) in `dtype`, 0 where no date is usable."""
    x = x.transpose(0, 1).to(dtype)
    return x if usable is None else torch.where(usable.any(0)[:, None], x, 0)


def validity(
    valid: Tensor | None, b: int, positions: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Sample b's validity (T, N), or None if all is valid.

    And, where it differs from position to position, what to add to energies: (T, N) of 0 and the
    lowest finite number, which gives weight 0 without inf - inf.
    """
    if valid is None:
        return None, None
    if valid.ndim == 2:
        return valid[b, :, None].expand(-1, positions), None
    bars = torch.zeros(valid.shape[1:], dtype=dtype, device=valid.device)
    return valid[b], bars.masked_fill_(~valid[b], torch.finfo(dtype).min)


def tiles(q: Tensor) -> Iterator[tuple[int, slice, list[slice]]]:
    """Sample, heads and blocks of queries such that heads * queries * energies fit in `BLOCK`."""
    B, T, N, H, D = q.shape
    width = max(N, T * max(T, D))
    heads = min(H, max(1, BLOCK // (N * width)))
    rows = min(N, max(1, BLOCK // (heads * width)))
    blocks = [slice(n, min(n + rows, N)) for n in range(0, N, rows)]
    for b in range(B):
        for h in range(0, H, heads):
            yield b, slice(h, min(h + heads, H)), blocks


def _triton(*inputs):
    from timo.kernels import gyroscope_attention as kernels

    return kernels.forward(*inputs)


def _triton_backward(*inputs):
    from timo.kernels import gyroscope_attention as kernels

    return kernels.backward(*inputs)


def _triton_atomic_backward(*inputs):
    from timo.kernels import gyroscope_attention as kernels

    return kernels.backward(*inputs, atomic=True)


def _request(q, *_, **__) -> Request:
    return Request(q.device, q.dtype, dates=q.shape[1], head_dim=q.shape[4])


def _request_backward(grad, *_, **__) -> Request:
    return _request(grad)


TRITON_LIMITS = {
    "dtypes": HALF_AND_SINGLE,
    "head_dims": (1, 128),
    "min_capability": (8, 0),
    **dispatch.BY_TRITON,
}
FORWARD = dispatch.register(
    "gyroscope_attention",
    _request,
    Backend(REFERENCE, reference, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, gyroscope_cpp.forward, ("cpu",), HALF_AND_SINGLE),
    Backend(TRITON, _triton, **TRITON_LIMITS),
    Backend(TRITON_ATOMIC, _triton, **TRITON_LIMITS, deterministic=False),  # for its backward
)
BACKWARD = dispatch.register(
    "gyroscope_attention_backward",
    _request_backward,
    Backend(REFERENCE, reference_backward, dispatch.ANY_DEVICE, FLOATS),
    Backend(CPP, gyroscope_cpp.backward, ("cpu",), HALF_AND_SINGLE),
    Backend(TRITON, _triton_backward, **TRITON_LIMITS),
    Backend(TRITON_ATOMIC, _triton_atomic_backward, **TRITON_LIMITS, deterministic=False),
)


def _run(*args):
    *inputs, backend = args
    return FORWARD.select(backend, *inputs).run(*inputs)


def _run_backward(*args):
    *inputs, backend = args
    return BACKWARD.select(backend, *inputs).run(*inputs)


def _fake(q, k, v, q_median, k_median, gate, valid, scale, backend):
    dtype = accumulation(q.dtype)
    return (
        q.new_empty(q.shape),
        q.new_empty(gate.shape, dtype=dtype),
        q.new_empty(q_median.shape[:3], dtype=dtype),
    )


def _fake_backward(grad, q, k, v, q_median, k_median, gate, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, q_median, k_median, gate))


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    *inputs, out, lse, spatial_lse = ctx.saved_tensors
    grads = torch.ops.timo.gyroscope_attention_backward(
        grad, *inputs, ctx.scale, out, lse, spatial_lse, ctx.backend
    )
    return *grads, None, None, None


def _save_backward(ctx, inputs, output):
    ctx.scale = inputs[8]
    ctx.save_for_backward(*inputs[:8])


def _backward_backward(ctx, *grads):
    refuse_third_derivative("gyroscope_attention")
    *tensors, valid = ctx.saved_tensors
    with torch.autocast(tensors[0].device.type, enabled=False), torch.enable_grad():
        grad, *inputs = [x.detach().requires_grad_() for x in tensors]
        out, _, _ = reference(*inputs, valid, ctx.scale)
        first = torch.autograd.grad(out, inputs, grad, create_graph=True)
        second = torch.autograd.grad(first, (grad, *inputs), grads)
    return *second, *[None] * 6


TENSORS = "Tensor q, Tensor k, Tensor v, Tensor q_median, Tensor k_median, Tensor gate"
define(
    f"gyroscope_attention({TENSORS}, Tensor? valid, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run, _fake, _backward, _save,
)  # fmt: skip
define(
    f"gyroscope_attention_backward(Tensor grad, {TENSORS}, Tensor? valid, float scale, "
    "Tensor out, Tensor lse, Tensor spatial_lse, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward, _backward_backward, _save_backward,
)  # fmt: skip
