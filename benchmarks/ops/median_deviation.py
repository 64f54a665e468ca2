"""median_deviation: backends, and medians with the projection in separate steps, against the floor.

Floor: q is read once, values, int64 indices and deviations are written once; backward reads all of
these again, with the gradient of deviations in their place, and writes the gradient of q.
"""

from functools import partial

import torch

from timo import ops
from timo.ops.median_deviation import FORWARD

from ..runner import Problem, able

LAYOUT = "B,T,N,H,D"
# Queries of base stages 1 and 2 at 224 x 224.
SHAPES = [(32, 10, 3136, 4, 32), (64, 3, 3136, 4, 32), (64, 10, 784, 8, 32)]
CPU_SHAPES = [(1, *shape[1:]) for shape in SHAPES]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, N, H, D = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, device=device)

    q, weight = draw(*shape).to(dtype).requires_grad_(), draw(D).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    cotangents = [draw(B, N, H, D).to(dtype), draw(B, T, N, H).to(wide)]
    backends, skipped = able(FORWARD, FORWARD.request(q, weight))

    def one_pass(backend):
        values, _, deviation = ops.median_deviation(q, weight, backend=backend)
        return values, deviation

    def separate():
        values = ops.temporal_median(q)[0]
        return values, ((q - values.unsqueeze(1)) @ weight.to(dtype)).to(wide)

    def exact():
        leaves = [x.detach().double().requires_grad_() for x in (q, weight)]
        values, _, deviation = ops.median_deviation(*leaves, backend="reference")
        grads = torch.autograd.grad([values, deviation], leaves, [x.double() for x in cotangents])
        return [values.detach(), deviation.detach()], list(grads)

    size, channels = q.element_size(), B * N * H * D
    results = channels * (size + 8) + B * T * N * H * wide.itemsize
    forward = channels * T * size + results
    backward = 2 * channels * T * size + results + channels * size
    return Problem(
        {**{name: partial(one_pass, name) for name in backends}, "separate": separate},
        backends, [q, weight], cotangents, exact,
        flop=dict.fromkeys(("forward", "backward", "both"), 0.0),
        traffic={"forward": forward, "backward": backward, "both": forward + backward},
        baseline=("separate", "reference"),
        skipped=skipped,
    )  # fmt: skip
