"""Validity of frames, pixels and tokens: true where there is something to see.

Everywhere below, `valid` is None (all usable), (B, T) for whole frames, or (B, T, h, w) for the
pixels or tokens of a map (specification: model.md §3). In pretraining, T counts mask units.
"""

from typing import overload

import torch
from torch import Tensor


@overload
def pool_valid(valid: Tensor, factor: int) -> Tensor: ...


@overload
def pool_valid(valid: Tensor | None, factor: int) -> Tensor | None: ...


def pool_valid(valid: Tensor | None, factor: int) -> Tensor | None:
    """Validity `factor` times coarser: a cell is valid if anything in it is.

    Args:
        valid: None, (B, T), or (B, T, h, w) with h and w multiples of `factor`.

    Returns:
        None, (B, T), or (B, T, h / factor, w / factor).
    """
    if valid is None or valid.ndim == 2:
        return valid
    return valid.unflatten(3, (-1, factor)).any(4).unflatten(2, (-1, factor)).any(3)


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """`x` (B, T, h, w, D) with 0, and gradient 0, at invalid entries, even where x is NaN."""
    if valid is None:
        return x
    return torch.where(valid[..., None] if valid.ndim == 4 else valid[:, :, None, None, None], x, 0)


def per_map(valid: Tensor | None) -> Tensor | None:
    """Validity of the B·T maps of a batch, (B·T, h, w) or (B·T, 1, 1)."""
    if valid is None or valid.ndim == 4:
        return None if valid is None else valid.flatten(0, 1)
    return valid.reshape(-1, 1, 1)


def per_token(valid: Tensor | None) -> Tensor | None:
    """Validity as attention takes it: (B, T) or (B, T, h·w)."""
    return valid.flatten(2) if valid is not None and valid.ndim == 4 else valid
