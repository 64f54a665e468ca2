"""Argument checks shared by the public functions of all floors."""

from collections.abc import Sequence

import torch
from torch import Tensor

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*HALF_AND_SINGLE, torch.float64)
RAW = (torch.uint8, torch.uint16, *FLOATS)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Of sums and statistics over numbers of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, x: object, layout: str, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise unless `x` is a non-empty tensor of `layout`'s rank and of one of `dtypes`.

    Args:
        name: the argument's name, for the message.
        layout: names of the dimensions, as "(B, T, N, H, D)".
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a tensor {layout}")
    if x.ndim != layout.count(",") + (not layout.endswith(",)")):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {layout}")
    if x.dtype not in dtypes:
        known = ", ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{name} is {dtype_name(x.dtype)}; it must be one of {known}")
    for size, dim in zip(x.shape, layout.strip("(),").split(", ")):
        if size == 0:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: {dim} is 0; every dimension of {layout} "
                "must be at least 1"
            )


def check_shape(name: str, x: Tensor, shape: Sequence[int], like: str) -> None:
    """Raise unless `x` has `shape`, which follows from the argument `like`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)} to match {like}"
        )


def check_same(name: str, x: Tensor, like: str, y: Tensor, dtype: bool = True) -> None:
    """Raise unless `x` lies on `y`'s device and, if asked, has its dtype."""
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} but {like} is on {y.device}; move one of them")
    if dtype and x.dtype != y.dtype:
        raise TypeError(
            f"{name} is {dtype_name(x.dtype)} but {like} is {dtype_name(y.dtype)}; convert one"
        )


def check_valid(valid: Tensor | None, shapes: dict[str, Sequence[int]], like: Tensor) -> None:
    """Raise unless `valid` is None or bool of one of `shapes`, given as {"(B, T)": (2, 3)}."""
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        found = dtype_name(valid.dtype) if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid is {found}; it must be a bool tensor, true where usable")
    if not any(tuple(valid.shape) == tuple(s) for s in shapes.values()):
        wanted = " or ".join(f"{layout} = {tuple(s)}" for layout, s in shapes.items())
        raise ValueError(f"valid has shape {tuple(valid.shape)}; it must be {wanted}")
    check_same("valid", valid, "the input", like, dtype=False)
