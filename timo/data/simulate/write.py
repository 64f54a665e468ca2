"""Simulated series as files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from timo.data.contract import IGNORE_INDEX, atomic_folder, with_progress
from timo.data.simulate.dataset import SimulatedSeries


def write_series(
    dataset: SimulatedSeries, folder: str | os.PathLike, count: int | None = None
) -> Path:
    """Write the first `count` samples (None: all) as a folder that `NumpySeries` reads.

    `<folder>/<name>/` holds `series.npy` `(T, C, H, W)`, `dates.json` (YYYY-MM-DD), `valid.npy`
    bool `(T, H, W)` and, where the dataset has a target, `mask.npy` uint8; `<folder>/config.json`
    states bands, units, scale, offset, classes and the arguments of the simulation. The folder
    appears, whole, only when everything is written. A progress bar shows where rich is installed.

    Returns the folder.

    Raises:
        ValueError: `count` is not in 1 ... len(dataset).
        DataError: `folder` exists and is not an empty folder, or its parent does not exist.
    """
    folder = Path(folder)
    count = len(dataset) if count is None else count
    if not 1 <= count <= len(dataset):
        raise ValueError(
            f"count must lie in 1 ... {len(dataset)}, the length of the dataset, got {count!r}"
        )
    with atomic_folder(folder) as partial:
        for index in with_progress(list(range(count)), "writing series"):
            _write_sample(dataset[index], partial)
        config = {
            "bands": list(dataset.bands),
            "units": dataset.units,
            "scale": dataset.scale.tolist(),
            "offset": dataset.offset.tolist(),
            "classes": list(dataset.classes),
            "ignore_index": IGNORE_INDEX,
            "samples": count,
            "simulation": dataset.arguments,
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _write_sample(sample: dict, parent: Path) -> None:
    folder = parent / sample["name"]
    folder.mkdir()
    np.save(folder / "series.npy", sample["image"].numpy())
    np.save(folder / "valid.npy", sample["valid"].numpy())
    days = sample["dates"].numpy().astype("datetime64[D]")
    (folder / "dates.json").write_text(json.dumps([str(day) for day in days]) + "\n")
    if "mask" in sample:
        np.save(folder / "mask.npy", sample["mask"].numpy().astype(np.uint8))
