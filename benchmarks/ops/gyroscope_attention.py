"""gyroscope_attention: backends against the direct form and the factored reference.

Floor: the products of the factored form, 2 N^2 D H (1 + T) FLOP forward and (3 + 2T) backward,
at the rate of a square matrix product in the same dtype and run.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from timo.ops import dispatch, gyroscope_attention

from .. import harness

module = sys.modules["timo.ops.gyroscope_attention"]

# (B, T, N, H, D): base stages 1 and 2 at 224 x 224.
SHAPES = [(8, 3, 3136, 4, 32), (8, 10, 3136, 4, 32), (8, 3, 784, 8, 32), (8, 10, 784, 8, 32)]


def rows(device: torch.device) -> Iterator[dict]:
    """One row per shape, dtype, direction and implementation, timed only if it is right."""
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for shape in SHAPES:
            if device.type == "cpu":
                shape = (1, *shape[1:])
            yield from _shape_rows(device, dtype, shape)


def _shape_rows(device, dtype, shape) -> Iterator[dict]:
    B, T, N, H, D = shape
    inputs = [torch.randn(shape, device=device).mul(0.5).to(dtype) for _ in range(3)]
    inputs += [x.median(1).values for x in inputs[:2]]
    inputs += [torch.rand(shape[:4], device=device).to(dtype)]
    cotangent = torch.randn(shape, device=device).to(dtype)
    leaves = [x.requires_grad_() for x in inputs]
    request = dispatch.Request(device, dtype, T, D)
    names = [n for n, b in module.FORWARD.backends.items() if not b.refusals(request)]
    calls = {name: partial(gyroscope_attention, *leaves, backend=name) for name in names}
    expected = _results(calls["reference"], leaves, cotangent)
    products = 2 * N * N * D * H * B
    for direction, flop in (("forward", 1 + T), ("backward", 3 + 2 * T)):
        rate = harness.matmul_rate(device, dtype)
        floor = products * flop / rate
        for name, call in (*calls.items(), ("direct", partial(_direct, *leaves))):
            parity = _close(_results(call, leaves, cotangent), expected)
            timing = _measure(direction, call, leaves, cotangent, device) if parity else None
            yield harness.row(
                op="gyroscope_attention", shape=list(shape), dtype=str(dtype), name=name,
                direction=direction, parity=parity, seconds=timing, floor_seconds=floor,
                of_floor=floor / timing.median if timing else None,
            )  # fmt: skip


def _measure(direction, call, leaves, cotangent, device) -> harness.Timing:
    if direction == "forward":
        with torch.no_grad():
            return harness.measure(call, device)
    out = call()
    return harness.measure(
        lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True), device
    )


def _results(call, leaves, cotangent) -> list[Tensor]:
    out = call()
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def _close(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Every result within one percent (float32: 1e-4) of the reference, in the mean square."""
    limit = 1e-4 if got[0].dtype == torch.float32 else 1e-2
    pairs = [(x.double(), y.double()) for x, y in zip(got, expected)]
    return all((x - y).norm() <= limit * y.norm() for x, y in pairs)


def _direct(q, k, v, q_median, k_median, gate) -> Tensor:
    """The published form: all T - 1 + N energies of every query, one softmax."""
    T = q.shape[1]
    temporal = torch.einsum("btnhd,bsnhd->bthns", q, k)
    own = torch.eye(T, dtype=torch.bool, device=q.device)[None, :, None, None]
    temporal = temporal.masked_fill(own, -torch.inf)
    spatial = torch.einsum("bnhd,bmhd->bhnm", q_median, k_median)
    spatial = spatial[:, None] + gate.transpose(2, 3)[..., None]
    weights = torch.cat([temporal, spatial.to(q.dtype)], -1).softmax(-1)
    out = torch.einsum("bthns,bsnhd->btnhd", weights[..., :T], v)
    return out + torch.einsum("bthnm,btmhd->btnhd", weights[..., T:], v)
