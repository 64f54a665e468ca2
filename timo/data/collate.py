"""Samples of unequal length as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from timo.data.contract import IGNORE_INDEX, DataError


def collate_series(samples: Sequence[dict] | dict) -> dict:
    """Batch samples of the contract, padding each series at its end to the longest.

    `image` (B, T, C, H, W) keeps its dtype and is 0 in padded frames, `dates` (B, T) repeat the
    last date, `valid` (B, T, H, W) is False there, `mask` is (B, H, W), or (B, T, H, W) with 255,
    `label` (B,), or (B, T) with 255.
    Other tensors are stacked; `name`, `window` and the like become lists.
    What is a batch already (a dict, see `LocationSeries.batch`) is returned as it is.
    Raises DataError where C, H, W, dtype or keys differ.
    """
    if isinstance(samples, dict):
        return samples
    first = samples[0]
    for sample in samples[1:]:
        _same(first, sample)
    longest = max(len(sample["dates"]) for sample in samples)
    batch = {}
    for key in first:
        values = [sample[key] for sample in samples]
        if key == "image":
            values = [_pad(v, longest, 0) for v in values]
        elif key == "valid":
            values = [_pad(v, longest, False) for v in values]
        elif key == "dates":
            values = [_pad(v, longest, v[-1]) for v in values]
        elif by_date(key, values[0]):
            values = [_pad(v, longest, IGNORE_INDEX) for v in values]
        batch[key] = torch.stack(values) if isinstance(values[0], Tensor) else values
    return batch


def by_date(key: str, value: object) -> bool:
    """Whether `value` of a sample has an entry for each date and must be cut and padded with it."""
    return key in ("image", "dates", "valid") or (
        isinstance(value, Tensor) and (key, value.ndim) in (("mask", 3), ("label", 1))
    )


def _pad(frames: Tensor, length: int, value) -> Tensor:
    missing = length - len(frames)
    if missing == 0:
        return frames
    padding = torch.full((missing, *frames.shape[1:]), value, dtype=frames.dtype)
    return torch.cat([frames, padding])


def _same(first: dict, other: dict) -> None:
    names = f"samples {first.get('name')!r} and {other.get('name')!r}"
    if first.keys() != other.keys():
        raise DataError(f"{names}: must hold the same, got {sorted(first)} and {sorted(other)}")
    a, b = first["image"], other["image"]
    if a.shape[1:] != b.shape[1:]:
        raise DataError(
            f"{names}: images of (C, H, W) {tuple(a.shape[1:])} and {tuple(b.shape[1:])} do not "
            "batch; select= the same bands, and cut windows of one size with tile=, or take "
            "batches of one (batch_size 1)"
        )
    if a.dtype != b.dtype:
        raise DataError(f"{names}: images of {a.dtype} and {b.dtype} do not batch; use one type")
    if "mask" in first and first["mask"].ndim != other["mask"].ndim:
        raise DataError(f"{names}: one has a mask for each frame, the other one for the series")
