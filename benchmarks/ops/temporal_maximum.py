"""temporal_maximum: backends and the published composition against the copy floor.

Floor: x is read once, values and int16 dates are written once; backward reads the gradient and the
dates, and writes the gradient of x.
"""

from functools import partial

import torch

from timo import ops
from timo.ops.temporal_maximum import FORWARD, as_maps, enlarge

from ..runner import Call, Problem, able

LAYOUT = "B,T,C,h,w,factor"
# The head's output of timo_base at 224 x 224, and of timo_tiny with more dates.
SHAPES = [(8, 10, 1024, 56, 56, 4), (8, 38, 256, 56, 56, 4)]
CPU_SHAPES = [(1, 10, 256, 56, 56, 4), (1, 38, 256, 56, 56, 4)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, C, h, w, factor = shape
    generator = torch.Generator(device).manual_seed(0)
    # Dates differ everywhere by more than rounding: a tie would turn the gradient another way.
    order = torch.rand((B, T, C, 1, 1), generator=generator, device=device).argsort(1)
    x = order + 0.6 * torch.rand((B, T, C, h, w), generator=generator, device=device)
    x = as_maps(x.to(dtype)).requires_grad_()
    size = (B, C, factor * h, factor * w)
    cotangent = torch.randn(size, generator=generator, device=device).to(dtype)
    cotangent = cotangent.contiguous(memory_format=torch.channels_last)
    backends, skipped = able(FORWARD, FORWARD.request(x))

    def fused(backend):
        return ops.temporal_maximum(x, None, factor, backend=backend)[:1]

    def published():
        return (enlarge(x.flatten(0, 1), factor).unflatten(0, (B, T)).max(1).values,)

    calls: dict[str, Call] = {name: partial(fused, name) for name in backends}
    calls["interpolate, max"] = published

    def exact():
        wide = x.detach().double().requires_grad_()
        values, _ = ops.temporal_maximum(wide, None, factor, backend="reference")
        (grad,) = torch.autograd.grad(values, wide, cotangent.double())
        return [values.detach()], [grad]

    entries = cotangent.numel()
    moved = x.numel() * x.element_size() + entries * (x.element_size() + 2)
    return Problem(
        calls, backends, [x], [cotangent], exact,
        flop=dict.fromkeys(("forward", "backward", "both"), 0.0),
        traffic={"forward": moved, "backward": moved, "both": 2 * moved},
        baseline=("interpolate, max", "reference"),
        skipped=skipped,
    )  # fmt: skip
