"""Compiled masked_pixel_loss, on the CPU and on CUDA devices.

Frames of any strides are not copied, and targets are not kept: the workspace is 32 bytes a unit.
"""

from typing import Any

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops.compiled import address, dense, launch, units

NORM_CODES = {"none": 0, "patch": 1, "batch": 2}


def forward(
    pred: Tensor,
    frames: Tensor,
    masked_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, mean, rstd and count as the reference gives them."""
    single: dict[str, Any] = {"dtype": torch.float32, "device": pred.device}
    loss, mean, rstd = (torch.empty(s, **single) for s in ((), masked_ids.shape, masked_ids.shape))
    count = torch.empty((), dtype=torch.int64, device=pred.device)
    partial = torch.empty((*masked_ids.shape, 4), dtype=torch.float64, device=pred.device)
    pred, ids = map(dense, (pred, masked_ids))
    scale, offset = map(dense, (scale, offset))
    launch(
        "masked_pixel_loss", pred.device, units(frames, ids, scale, offset, valid, unit),
        [*map(address, (pred, mean, rstd, loss, count, partial)), 0, 0],
        dispatch.dtype_code(pred.dtype), NORM_CODES[norm],
    )  # fmt: skip
    return loss, mean, rstd, count


def backward(
    grad: Tensor,
    pred: Tensor,
    frames: Tensor,
    masked_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
) -> Tensor:
    """Gradient of the prediction; the kernel reads the frames again."""
    out = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    pred, ids = map(dense, (pred, masked_ids))
    scale, offset = map(dense, (scale, offset))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    launch(
        "masked_pixel_loss_backward", pred.device, units(frames, ids, scale, offset, valid, unit),
        [*map(address, (pred, mean, rstd, None, count, None, grad, out))],
        dispatch.dtype_code(pred.dtype), 0,
    )  # fmt: skip
    return out
