"""The one rule for numerical parity (no test has a tolerance of its own)."""

import torch
from torch import Tensor


def assert_close(
    got: Tensor,
    exact: Tensor,
    plain: Tensor | None = None,
    name: str = "",
    terms: Tensor | None = None,
) -> None:
    """Check a low-precision result against float64.

    The largest error may be at most twice that of the plain low-precision implementation, plus
    one unit in the last place at the largest exact value.

    Args:
        got: the result under test.
        exact: the same in float64.
        plain: the same from the reference in `got`'s dtype; without it only the ulp term counts,
            eight of them, for results that are a short sum.
        terms: for sums whose terms cancel, the sums of the terms' absolute values: there the unit
            is taken, in `plain`'s dtype if given.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.isfinite().all() or not exact.isfinite().all(), f"{name}: not finite"
    if got.numel() == 0:
        return
    ulp = torch.finfo(got.dtype).eps * exact.abs().max().item()
    if terms is not None:
        ulp = torch.finfo((got if plain is None else plain).dtype).eps * terms.max().item()
    error = (got.double() - exact).abs().max().item()
    allowed = ulp * 8 if plain is None else 2 * (plain.double() - exact).abs().max().item() + ulp
    allowed += torch.finfo(got.dtype).tiny
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
