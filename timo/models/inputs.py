"""What models check at their public door, and how they pad and clear frames."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from timo.ops.checks import (
    FLOATS,
    RAW,
    check_same,
    check_shape,
    check_tensor,
    check_valid,
    dtype_name,
)

UNIT = 32  # pixels along a mask unit's side, and the stride of the last stage


def check_series(
    frames: Tensor,
    dates: Tensor | None,
    valid: Tensor | None,
    weight: Tensor,
    temporal_position: str,
    raw: bool = False,
) -> None:
    """Raise unless a model with the first convolution `weight` can take these inputs.

    Args:
        frames: (B, T, C, H, W), floating; with `raw`, uint8 and uint16 too.
        dates: (B, T) integer days, needed if `temporal_position` is "days".
        valid: (B, T) or (B, T, H, W) bool.
        weight: (D, C, 7, 7), tells the number of bands and the device.

    Raises:
        TypeError, ValueError: names the argument, what it was, what it must be and the remedy.
    """
    if isinstance(frames, Tensor) and not raw and frames.dtype not in FLOATS:
        raise TypeError(
            f"frames is {dtype_name(frames.dtype)}; it must be floating: convert raw values "
            "first, as frames * scale + offset"
        )
    check_tensor("frames", frames, "(B, T, C, H, W)", RAW if raw else FLOATS)
    bands, in_chans = frames.shape[2], weight.shape[1]
    if bands != in_chans:
        raise ValueError(
            f"frames has {bands} bands, shape {tuple(frames.shape)}; it must have {in_chans}: pass "
            f"the bands that the model was built for, or create it with in_chans={bands}"
        )
    check_same("frames", frames, "the model", weight, dtype=False)
    B, T, _, H, W = frames.shape
    check_valid(valid, {"(B, T)": (B, T), "(B, T, H, W)": (B, T, H, W)}, frames)
    if dates is not None:
        check_tensor("dates", dates, "(B, T)", (torch.int64, torch.int32))
        check_shape("dates", dates, (B, T), "frames (B, T)")
        check_same("dates", dates, "frames", frames, dtype=False)
    elif temporal_position == "days":
        raise ValueError(
            'dates is missing; a model with temporal_position="days" needs (B, T) int64 days'
        )


def pad_frames(frames: Tensor) -> Tensor:
    """Pad (B, T, C, H, W) with zeros, right and below, to multiples of 32."""
    padding = _padding(*frames.shape[3:])
    return F.pad(frames, padding) if any(padding) else frames


@overload
def pad_valid(valid: Tensor, frames: Tensor) -> Tensor: ...


@overload
def pad_valid(valid: Tensor | None, frames: Tensor) -> Tensor | None: ...


def pad_valid(valid: Tensor | None, frames: Tensor) -> Tensor | None:
    """Validity that goes with `pad_frames(frames)`: the padding is invalid.

    Returns:
        None or (B, T) as given where nothing is padded, else (B, T, H, W) of the padded size.
    """
    B, T, _, H, W = frames.shape
    padding = _padding(H, W)
    if not any(padding):
        return valid
    if valid is None:
        valid = torch.ones((), dtype=torch.bool, device=frames.device).expand(B, T)
    if valid.ndim == 2:
        valid = valid[:, :, None, None].expand(B, T, H, W)
    return F.pad(valid, padding)


def _padding(height: int, width: int) -> tuple[int, int, int, int]:
    return 0, -width % UNIT, 0, -height % UNIT


def clear_invalid(frames: Tensor, valid: Tensor | None) -> Tensor:
    """(B, T, C, H, W) with 0 at invalid pixels, even where a pixel is NaN."""
    if valid is None:
        return frames
    valid = valid[:, :, None] if valid.ndim == 4 else valid[:, :, None, None, None]
    return torch.where(valid, frames, 0)
