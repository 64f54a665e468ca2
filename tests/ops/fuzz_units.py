"""Random problems for gather_units and scatter_units, against the loops of their own tests."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.guards import guarded
from tests.ops import test_gather_units as of_gather
from tests.ops import test_scatter_units as of_scatter
from tests.ops.fuzz import Case, draw, generator, pick
from tests.tolerance import assert_close
from timo.ops import gather_units, scatter_units

KINDS = {"none": "none", "date": "date", "position": "pixel"}


def random_frames(case: Case) -> tuple:
    """B, T, C, H, W, unit, halo and the number of units, frames smaller than a unit among them."""
    g = generator(case.number)
    B, T, C = draw(g, 1, 2), draw(g, 1, 4), pick(g, (1, 2, 3, draw(g, 4, 12)))
    unit = pick(g, (1, 3, 4, 8, draw(g, 5, 17)))
    H, W = draw(g, 1, 3 * unit), draw(g, 1, 3 * unit)
    halo = pick(g, ((0, 0), (3, 2), (draw(g, 0, 2 * unit), draw(g, 0, 2 * unit))))
    units = T * -(-H // unit) * -(-W // unit)
    return B, T, C, H, W, unit, halo, draw(g, 1, min(units, 12))


def hide(frames: Tensor, valid: Tensor | None) -> None:
    """NaN where not valid."""
    frames[~of_gather.spread(valid, frames)[:, :, None].expand(frames.shape)] = torch.nan


def gather(case: Case) -> Callable[..., None]:
    sizes = random_frames(case)
    unit, halo = sizes[5:7]
    frames, ids, scale, offset, valid = of_gather.make(
        sizes, KINDS[case.kind], case.dtype, case.number
    )
    wide = frames.double().requires_grad_()
    exact = of_gather.loop(wide, ids, scale, offset, valid, unit, halo)
    cotangent = torch.randn(exact.shape, generator=generator(case.number)).to(case.dtype)
    (exact_grad,) = torch.autograd.grad(exact, wide, cotangent.double())
    hide(frames, valid)

    def check(**backend):
        leaf = frames.detach().requires_grad_()
        with guarded():
            tiles = gather_units(
                leaf, ids, scale=scale, offset=offset, valid=valid, unit=unit, halo=halo, **backend
            )
            (grad,) = torch.autograd.grad(tiles, leaf, cotangent)
        assert_close(tiles.detach(), exact.detach(), name=f"tiles {sizes}")
        assert_close(grad, exact_grad, name=f"gradient {sizes}")

    return check


def scatter(case: Case) -> Callable[..., None]:
    g = generator(case.number)
    L = draw(g, 1, 150)
    shape = draw(g, 1, 4), draw(g, 1, L), L, pick(g, (1, 16, draw(g, 2, 70)))
    tokens, ids, mask_token, position, cotangent = of_scatter.make(shape, case.dtype, case.number)
    inputs = tokens, mask_token, position
    wide = [x.double().requires_grad_() for x in inputs]
    exact = of_scatter.loop(wide[0], ids, *wide[1:])
    expected = exact.detach(), *torch.autograd.grad(exact, wide, cotangent.double(), True)
    sizes = exact.detach().abs(), *torch.autograd.grad(exact, wide, cotangent.double().abs())

    def check(**backend):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with guarded():
            out = scatter_units(leaves[0], ids, *leaves[1:], **backend)
            got = out.detach(), *torch.autograd.grad(out, leaves, cotangent)
        names = "out", "tokens", "mask_token", "position"
        for name, x, y, terms in zip(names, got, expected, sizes):
            assert_close(x, y, name=f"{name} {shape}", terms=terms)

    return check


CHECKS = {"gather_units": gather, "scatter_units": scatter}
