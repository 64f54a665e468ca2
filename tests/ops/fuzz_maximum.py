"""Random problems for temporal_maximum, against the exact maps of its own tests."""

from collections.abc import Callable

import torch

from tests.guards import guarded
from tests.ops import test_temporal_maximum as of_maximum
from tests.ops.fuzz import KINDS, Case, draw, generator, laid_out, pick, same_bits
from timo.ops import temporal_maximum


def random_shape(case: Case) -> tuple[int, ...]:
    """B, T, C, h, w and factor."""
    g = generator(case.number)
    while True:
        B, T, C = (
            draw(g, 1, 2),
            draw(g, 1, 6),
            pick(g, (1, 2, draw(g, 3, 20), 64, draw(g, 60, 140))),
        )
        h, w, factor = draw(g, 1, 6), draw(g, 1, 6), pick(g, (1, 2, 3, 4, 4, 5))
        if B * T * h * w * factor**2 <= 1000:  # in the interpreter seconds
            return B, T, C, h, w, factor


def maximum(case: Case) -> Callable[..., None]:
    shape = B, T, C, h, w, factor = random_shape(case)
    g = generator(case.number, KINDS.index(case.kind), case.dtype.itemsize)
    x = torch.randn(B, T, C, h, w, generator=g)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.5, x.round(), x)  # ties
    x = laid_out(x.to(case.dtype), g)
    valid = None
    if case.kind != "none":
        size = (T, B) if case.kind == "date" else (T, B, w, h)
        valid = torch.rand(size, generator=g) < pick(g, (0.1, 0.5, 0.9))
        valid = valid.T if case.kind == "date" else valid.permute(1, 0, 3, 2)
    if case.kind == "date":  # whole dates have no part in others
        x[~valid] = torch.nan
    cotangent = torch.randn(B, C, factor * h, factor * w, generator=g).to(case.dtype)
    cotangent = laid_out(cotangent, g)
    kept = x.clone(), cotangent.clone()

    def check(**backend):
        leaf = x.detach().requires_grad_()
        with guarded():
            out, dates = temporal_maximum(leaf, valid, factor, **backend)
            (grad,) = torch.autograd.grad(out, leaf, cotangent)
        seen = x.nan_to_num() if case.kind == "date" else x
        of_maximum.check(out.detach(), dates, grad, seen, valid, cotangent, shape)
        assert same_bits(x, kept[0]) and same_bits(cotangent, kept[1]), "an input was written to"

    return check


CHECKS = {"temporal_maximum": maximum}
