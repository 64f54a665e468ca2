"""gyroscope_attention: its backends, and what PyTorch offers (gyroscope_baselines.py).

Floor: the products of the factored form, 2 N^2 D H (1 + T) FLOP forward and (3 + 2T) backward, at
the rate of a square matrix product in the same dtype and run; or the least traffic at the rate of
a copy, where that takes longer.
"""

import sys
from functools import partial

import torch

from timo.ops import dispatch, gyroscope_attention

from .. import harness
from ..runner import Problem, able
from . import gyroscope_baselines as baselines

module = sys.modules["timo.ops.gyroscope_attention"]
LAYOUT = "B,T,N,H,D"
# Base stages 1 and 2 and large stage 1 at 224 x 224, base stages 1 and 2 at 512 x 512.
STAGES = [(8, 3136, 4, 32), (8, 784, 8, 32), (8, 3136, 6, 64), (1, 16384, 4, 32), (1, 4096, 8, 32)]
SHAPES = [(B, T, N, H, D) for T in (10, 3, 38, 1) for B, N, H, D in STAGES]
CPU_SHAPES = [(1, T, N, H, D) for T in (10, 3, 1) for _, N, H, D in STAGES[:2]]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, N, H, D = shape
    leaves, cotangent = inputs(shape, dtype, device)
    backends, skipped = able(module.FORWARD, dispatch.Request(device, dtype, T, D))
    calls = {name: _one(partial(gyroscope_attention, backend=name), leaves) for name in backends}
    torch._dynamo.reset()  # code compiled for other shapes
    others = baselines.implementations(device.type)
    calls |= {name: _one(function, leaves) for name, function in others.items()}
    if device.type == "cpu":
        skipped["flex-compiled"] = "flex_attention gives no log-sum-exp on CPUs"
    there = harness.available_memory(device)
    forward_only: dict[str, str] = {}
    needs = {"direct": baselines.direct_bytes(shape), "factored": baselines.factored_bytes(shape)}
    for name in others:
        for need, gap in zip(
            needs.get(name.removesuffix("-compiled"), ()), (skipped, forward_only)
        ):
            if need > 0.9 * there:
                gap[name] = f"needs about {need / 2**30:.1f} GiB; {there / 2**30:.1f} are free"

    def exact():
        wide = [x.detach().double().requires_grad_() for x in leaves]
        out = gyroscope_attention(*wide, backend="reference")
        return [out.detach()], list(torch.autograd.grad(out, wide, cotangent.double()))

    product = 2.0 * B * N * N * H * D
    series, queries = B * T * N * H * D * dtype.itemsize, B * T * N * H * 4
    flop = {"forward": product * (1 + T), "backward": product * (3 + 2 * T)}
    traffic = {  # q, k, v, out; the same, the incoming and three outgoing gradients; medians, gate
        "forward": series * (4 + 2 / T) + 2 * queries,
        "backward": series * (8 + 4 / T) + 3 * queries,
    }
    for least in (flop, traffic):
        least["both"] = least["forward"] + least["backward"]
    return Problem(
        calls, backends, leaves, [cotangent], exact, flop, traffic,
        baseline=("direct", "factored", "reference"), skipped=skipped, forward_only=forward_only,
    )  # fmt: skip


def inputs(shape, dtype, device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves with the strides that the layer's projections give, and a cotangent."""
    B, T, N, H, D = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, device=device)

    q = draw(B, T, N, H, D).mul_(0.5).to(dtype)
    k, v = draw(B, T, N, 2, H, D).mul_(0.5).to(dtype).unbind(3)
    gate = draw(B, T, N, H).relu_().to(torch.promote_types(dtype, torch.float32))
    leaves = [q, k, v, q.median(1).values, k.median(1).values, gate]
    return [x.requires_grad_() for x in leaves], draw(B, T, N, H, D).to(dtype)


def _one(function, leaves):
    """A call of `function` that gives its output as the only one of several."""
    return lambda: (function(*leaves),)
