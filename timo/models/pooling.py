"""The maximum over dates of maps at full resolution (specification: model.md §4)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling of (M, C, h, w)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def greatest(x: Tensor, valid: Tensor | None, factor: int = 1) -> Tensor:
    """Maximum over valid dates of enlarged maps; 0 where there is none.

    The gradient goes to the earliest of the dates that have it, and what is kept for it is the date
    of each entry. Where graphs are compiled or traced, and on GPUs where algorithms must be
    deterministic, it is that of `torch.maximum`, for which every map is kept.

    Args:
        x: (B, T, C, h, w) of any floating dtype.
        valid: None, (B, T) or (B, T, h, w) bool.
        factor: of the enlargement, ahead of the maximum.

    Returns:
        (B, C, factor·h, factor·w), in the dtype of x, under autocast in that of interpolate.
    """
    usable = None
    if valid is not None:
        usable = valid[:, :, None] if valid.ndim == 4 else valid[:, :, None, None, None]
        if valid.ndim == 4:
            usable = usable.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    if torch.compiler.is_exporting():  # for any number of dates
        maps = enlarge(x.flatten(0, 1), factor).unflatten(0, x.shape[:2])
        best = (maps if usable is None else torch.where(usable, maps, -torch.inf)).amax(1)
        return best if usable is None else torch.where(usable.any(1), best, 0)
    tracked = torch.is_grad_enabled() and x.requires_grad
    # The kernel of the enlargement's gradient takes no symbolic sizes, and is not deterministic on
    # GPUs, where interpolate has another one.
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = plain or (torch.are_deterministic_algorithms_enabled() and x.device.type != "cpu")
    return (_Greatest.apply if tracked and not plain else _by_date)(x, usable, factor)[0]


def _by_date(
    x: Tensor, usable: Tensor | None, factor: int, dated: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One date after the other: at full resolution a map has up to 2048 channels.

    Args:
        x: (B, T, C, h, w).
        usable: None, or bool of five dimensions, broadcastable to the enlarged maps.
        factor: of the enlargement.
        dated: whether to tell the dates.

    Returns:
        the maximum, (B, C, factor·h, factor·w), 0 where no date is usable, and the date that has
        it, T where none is; None if not `dated`.
    """

    def map_of(t: int) -> Tensor:
        map_ = enlarge(x[:, t], factor)
        return map_ if usable is None else map_.masked_fill(~usable[:, t], -torch.inf)

    dates, best, date = x.shape[1], map_of(0), None
    if dated:
        date = torch.zeros_like(best, dtype=torch.uint8 if dates < 256 else torch.int32)
    for t in range(1, dates):
        map_ = map_of(t)
        if date is not None:
            date.masked_fill_(map_ > best, t)
        best = torch.maximum(best, map_)
    if usable is not None:
        none = ~usable.any(1)
        best = best.masked_fill(none, 0)
        date = None if date is None else date.masked_fill(none, dates)
    return best, date


class _Greatest(torch.autograd.Function):
    """`_by_date`, whose gradient needs the dates alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, usable: Tensor | None, factor: int) -> tuple[Tensor, Tensor | None]:
        best, date = _by_date(x, usable, factor, dated=True)
        alias = x.shape[1] == factor == 1 and usable is None  # a view of x is no output
        return best.clone() if alias else best, date

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any, int], output: tuple) -> None:
        ctx.shape, ctx.factor = inputs[0].shape, inputs[2]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        (date,) = ctx.saved_tensors
        B, T, C, h, w = ctx.shape
        grads = []
        for t in range(T):
            part = grad.masked_fill(date != t, 0)
            if ctx.factor != 1:
                part = torch.ops.aten.upsample_bilinear2d_backward(
                    part, date.shape[2:], (B, C, h, w), False, float(ctx.factor), float(ctx.factor)
                )
            grads.append(part)
        return torch.stack(grads, 1), None, None
