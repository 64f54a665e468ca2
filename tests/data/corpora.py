"""Small pretraining corpora on disk, written without the library."""

import csv
from pathlib import Path

import numpy as np

from tests.data.writers import TRANSFORM, write_tif

DATES = [f"{year}{month:02d}{5 + k:02d}" for k, (year, month) in enumerate(
    (y, m) for y in (2016, 2017, 2018) for m in (1, 4, 7, 10)
)]  # fmt: skip


def scene(seed: int, size: int, bands: int = 3, dtype="uint8") -> np.ndarray:
    """Dark ground (C, size, size) with values 1 ... 119."""
    return np.random.default_rng(seed).integers(1, 120, (bands, size, size)).astype(dtype)


def write_seco(root: Path, locations: int = 3, dates=DATES, size: int = 24, seed: int = 0) -> Path:
    """`<root>/<location>/<YYYYMMDDThhmmss>_.../B4.tif, B3.tif, B2.tif`, written in mixed order."""
    for location in np.random.default_rng(seed).permutation(locations):
        for k, date in enumerate(dates):
            pixels = scene(1000 * seed + 100 * int(location) + k, size)
            folder = root / f"{location:06d}" / f"{date}T101031_{date}T101026_T32TQM"
            for band, plane in zip(("B4", "B3", "B2"), pixels):
                write_tif(folder / f"{band}.tif", plane, transform=TRANSFORM)
    return root


def write_published_layout(root: Path, locations: int = 3, t: int = 10, size: int = 24) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = ["loc," + ",".join(f"t{i + 1}" for i in range(t))]
    for location in range(locations):
        pixels = np.stack([scene(100 * location + k, size) for k in range(t)])
        np.save(root / f"{location:06d}.npy", pixels)
        lines.append(f"{location}," + ",".join(DATES[:t]))
    (root / "dates.csv").write_text("\n".join(lines) + "\n")
    return root


def rejections(out: Path) -> list[dict]:
    """Lines of the log of the store `out`."""
    with open(out / "rejected.csv", newline="") as file:
        return list(csv.DictReader(file))
