"""Compiled gather_units, on the CPU and on CUDA devices. Frames of any strides are not copied."""

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops.compiled import dense, launch, units


def forward(
    frames: Tensor,
    visible_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
    before: int,
    after: int,
    dtype: torch.dtype,
) -> Tensor:
    """Tiles as the reference gives them."""
    (B, K), size = visible_ids.shape, before + unit + after
    tiles = torch.empty((B, K, frames.shape[2], size, size), dtype=dtype, device=frames.device)
    ids, scale, offset = dense(visible_ids), dense(scale), dense(offset)
    launch(
        "gather_units", frames.device, units(frames, ids, scale, offset, valid, unit),
        tiles.data_ptr(), dispatch.dtype_code(dtype), before, after,
    )  # fmt: skip
    return tiles


def backward(
    grad: Tensor,
    visible_ids: Tensor,
    scale: Tensor | None,
    valid: Tensor | None,
    dates: int,
    height: int,
    width: int,
    unit: int,
    before: int,
    after: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the frames; the kernel writes every pixel of it."""
    shape = (grad.shape[0], dates, grad.shape[2], height, width)
    frames = torch.empty(shape, dtype=dtype, device=grad.device)
    grad, ids, scale = dense(grad), dense(visible_ids), dense(scale)
    launch(
        "gather_units_backward", grad.device, units(frames, ids, scale, None, valid, unit),
        grad.data_ptr(), dispatch.dtype_code(grad.dtype), before, after,
    )  # fmt: skip
    return frames
