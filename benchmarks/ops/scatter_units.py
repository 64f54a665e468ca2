"""scatter_units: a quarter of the decoder's input is visible tokens, the rest the mask token.

Floor: tokens and positional code are read once, the sequence is written once; backward reads its
gradient and writes that of the tokens.
"""

from functools import partial

import torch

from timo import ops
from timo.ops import dispatch
from timo.ops.scatter_units import FORWARD

from ..runner import Call, Problem, able

LAYOUT = "B,T,N,D"
# The base decoder at 224 x 224 and 512 x 512.
SHAPES = [(2048, 3, 49, 512), (512, 10, 49, 512), (128, 10, 256, 512)]
CPU_SHAPES = [(8, 3, 49, 512), (4, 10, 256, 512)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, N, D = shape
    generator = torch.Generator(device).manual_seed(0)
    order = torch.rand(B, T * N, generator=generator, device=device).argsort(1)
    visible = order[:, : max(1, T * N // 4)].sort(1).values

    def draw(*size):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    tokens, mask = draw(*visible.shape, D).requires_grad_(), draw(D).requires_grad_()
    position, cotangent = draw(T * N, D), draw(B, T * N, D)

    def ours(backend):
        return (ops.scatter_units(tokens, visible, mask, position, backend=backend),)

    backends, skipped = able(FORWARD, dispatch.Request(device, dtype))
    calls: dict[str, Call] = {name: partial(ours, name) for name in backends}
    compiled = torch.compile(restored, dynamic=False)
    calls["restored"] = lambda: (restored(tokens, visible, mask, position),)
    calls["restored-compiled"] = lambda: (compiled(tokens, visible, mask, position),)

    def exact():
        wide = [x.detach().double().requires_grad_() for x in (tokens, mask)]
        out = ops.scatter_units(wide[0], visible, wide[1], position.double(), backend="reference")
        return [out.detach()], list(torch.autograd.grad(out, wide, cotangent.double()))

    sequence, seen = B * T * N * D * dtype.itemsize, visible.numel() * D * dtype.itemsize
    traffic = {"forward": seen + sequence / B + sequence, "backward": sequence + seen}
    traffic["both"] = traffic["forward"] + traffic["backward"]
    return Problem(
        calls, backends, [tokens, mask], [cotangent], exact,
        flop=dict.fromkeys(traffic, 0.0), traffic=traffic, baseline=("restored", "reference"),
        skipped=skipped,
    )  # fmt: skip


def restored(tokens, visible, mask, position) -> torch.Tensor:
    """Visible tokens, then mask tokens, brought into order by one gather."""
    B, K, D = tokens.shape
    seen = torch.zeros(B, position.shape[0], dtype=torch.bool, device=tokens.device)
    seen = seen.scatter(1, visible, True)
    # A place's rank among the visible, or behind all of them among the masked.
    rank = torch.where(seen, seen.cumsum(1) - 1, K + (~seen).cumsum(1) - 1)
    rest = mask.expand(B, position.shape[0] - K, D)
    sequence = torch.cat([tokens, rest], 1)
    return sequence.gather(1, rank[..., None].expand(-1, -1, D)) + position
