"""Calls into `timo._C`: arguments are addresses, strides and sizes."""

from typing import overload

import torch
from torch import Tensor

from timo.ops import dispatch


def launch(name: str, device: torch.device, *args) -> None:
    """Run `<name>_cpu`, or `<name>_cuda` on the current stream of `device`."""
    if device.type == "cpu":
        torch.get_num_threads()  # of which this thread may know only once PyTorch was asked
        getattr(dispatch.compiled(), f"{name}_cpu")(*args)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(dispatch.compiled(), f"{name}_cuda")(*args, stream)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@overload
def dense(x: Tensor) -> Tensor: ...


@overload
def dense(x: Tensor | None) -> Tensor | None: ...


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def units(
    frames: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    valid: Tensor | None,
    unit: int,
) -> tuple:
    """`Units` of csrc/ops.h. Frames and validity have any strides, the others must be dense."""
    if valid is not None and valid.ndim == 2:
        valid = valid[:, :, None, None].expand(*valid.shape, *frames.shape[3:])
    return (
        [address(x) for x in (frames, valid, scale, offset, ids)],
        list(frames.stride()),
        [0] * 4 if valid is None else list(valid.stride()),
        [*frames.shape, ids.shape[1], unit],
        dispatch.dtype_code(frames.dtype),
    )
