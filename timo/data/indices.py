"""Spectral indices, with bands found by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from timo.data.contract import IGNORE_INDEX, DataError


def normalized_difference(image: Tensor, bands: Sequence[str], first: str, second: str) -> Tensor:
    """(first - second) / (first + second), float32 (..., H, W), of `image` (..., C, H, W).

    `bands` names the C channels. Where the sum is 0 the index is 0. It does not change with a
    scale common to both bands, but it does with an offset: give physical values.
    """
    missing = [band for band in (first, second) if band not in bands]
    if missing:
        raise DataError(f"bands: the index needs {' and '.join(missing)}, got {tuple(bands)}")
    a = image.select(-3, list(bands).index(first)).float()
    b = image.select(-3, list(bands).index(second)).float()
    total = a + b
    return torch.where(total == 0, 0.0, (a - b) / total)


def mndwi(image: Tensor, bands: Sequence[str], green="Green", swir1="SWIR1") -> Tensor:
    """Modified normalised difference water index (Xu 2006) of Green and SWIR1, (..., H, W)."""
    return normalized_difference(image, bands, green, swir1)


def open_water(
    image: Tensor, valid: Tensor, bands: Sequence[str], threshold: float = 0.0
) -> Tensor:
    """Water mask of every date: 1 where MNDWI > `threshold`, else 0, 255 where not valid.

    `image` (T, C, H, W) physical, `valid` bool (T, H, W); returns int64 (T, H, W). Water is dark
    in SWIR1, soil and plants are bright, so 0 separates them in reflectance as in composites that
    stretch the bands alike. Fits `labels=` of RasterSeries and NumpySeries.
    """
    water = (mndwi(image, bands) > threshold).long()
    return water.masked_fill(~valid, IGNORE_INDEX)
