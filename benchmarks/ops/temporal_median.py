"""temporal_median: backends and torch.median against the copy floor.

Floor: x is read once, values and int64 indices are written once; backward reads the gradient and
the indices, and writes the gradient of x.
"""

from functools import partial

import torch

from timo import ops
from timo.ops.temporal_median import FORWARD

from ..runner import Call, Problem, able

LAYOUT = "B,T,N,H,D"
# Queries of base stages 1 and 2 at 224 x 224.
SHAPES = [(32, 10, 3136, 4, 32), (64, 3, 3136, 4, 32), (32, 38, 784, 8, 32)]
CPU_SHAPES = [(1, *shape[1:]) for shape in SHAPES]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, N, H, D = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    cotangent = torch.randn((B, N, H, D), generator=generator, device=device).to(dtype)
    backends, skipped = able(FORWARD, FORWARD.request(x))
    calls: dict[str, Call] = {
        name: partial(ops.temporal_median, x, backend=name) for name in backends
    }
    calls["torch.median"] = lambda: (x.median(1).values,)

    def exact():
        values, indices = ops.temporal_median(x, backend="reference")
        (grad,) = torch.autograd.grad(values, x, cotangent)
        return [values.detach(), indices], [grad]

    channels = B * N * H * D
    moved = channels * ((T + 1) * x.element_size() + 8)
    return Problem(
        calls, backends, [x], [cotangent], exact,
        flop=dict.fromkeys(("forward", "backward", "both"), 0.0),
        traffic={"forward": moved, "backward": moved, "both": 2 * moved},
        baseline=("torch.median", "reference"),
        skipped=skipped,
        forward_only={"torch.median": "its gradient may go to any of several equal dates"},
    )  # fmt: skip
