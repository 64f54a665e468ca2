"""Small series on disk, written without the library."""

import json
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine

TRANSFORM = Affine(10, 0, 500_000, 0, -10, 9_000_000)


def write_tif(
    path: Path, pixels, nodata=None, crs="EPSG:32718", transform=TRANSFORM, descriptions=()
):
    """`pixels` (C, H, W) or (H, W)."""
    pixels = np.atleast_3d(pixels.T).T if pixels.ndim == 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=pixels.shape[0],
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype=pixels.dtype,
        nodata=nodata,
        crs=crs,
        transform=transform,
    ) as file:
        file.write(pixels)
        for number, text in enumerate(descriptions, 1):
            file.set_band_description(number, text)
    return path


def frames(count: int, bands=3, height=40, width=50, dtype="uint16", seed=0) -> np.ndarray:
    """Random frames (T, C, H, W) with values 1 ... 200; no 0, which tests use as nodata."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 200, (count, bands, height, width)).astype(dtype)


def write_rasters(folder: Path, names, pixels, **options) -> list[Path]:
    """One file for each name and frame, written in a shuffled order."""
    order = np.random.default_rng(1).permutation(len(names))
    paths = [folder / f"{name}.tif" for name in names]
    for i in order:
        write_tif(paths[i], pixels[i], **options)
    return paths


def write_numpy(folder: Path, pixels, dates, valid=None, mask=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "series.npy", pixels)
    (folder / "dates.json").write_text(json.dumps(dates))
    if valid is not None:
        np.save(folder / "valid.npy", valid)
    if mask is not None:
        np.save(folder / "mask.npy", mask)
    return folder
