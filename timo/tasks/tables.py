"""A row for every series, or for every date of one: embeddings, and classes with probabilities."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timo.data import IGNORE_INDEX, DataError, SeriesDataset, collate_series, physical
from timo.data.contract import atomic_output, with_progress
from timo.data.series import WindowedSeries
from timo.models.classifier import mean_of_valid
from timo.tasks.base import SeriesTask
from timo.tasks.classification import ClassificationTask
from timo.tasks.data import compact_valid

_READ = ("image", "dates", "valid", "name")  # of a sample; masks do not matter here


@dataclass(frozen=True, slots=True)
class Row:
    """One series, or one date of it.

    Attributes:
        name, window: as in the sample; no window where it has none.
        size: (rows, columns) of the sample.
        label: of the series, or of the date; None where the sample has none of that kind.
        start, end: first and last acquisition date, the same of a single date.
        values: (D,) float32, finite; None where no pixel is valid.
    """

    name: str
    window: tuple[int, int] | None
    size: tuple[int, int]
    label: int | None
    start: np.datetime64
    end: np.datetime64
    values: np.ndarray | None


@torch.inference_mode()
def table_rows(
    compute: Callable[[dict], Tensor],
    task: SeriesTask,
    dataset: SeriesDataset,
    per_frame: bool,
    batch_size: int,
    what: str,
) -> Iterator[Row]:
    """Rows of what `compute` gives, in the order of the dataset.

    Args:
        compute: (B, D) of a batch on the task's device, or (B, T, D) with `per_frame`.
        task: reads `dataset` from here on.
        what: title of the progress bar.

    Raises:
        DataError: other bands or units than the task's, samples that do not batch, or values
            that are not finite.
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    task.read_from(dataset)
    for first in with_progress(range(0, len(dataset), batch_size), what):
        samples = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
        batch = collate_series([{key: sample[key] for key in _READ} for sample in samples])
        valid = batch["valid"].flatten(2).any(2)  # [B, T]
        batch["valid"] = compact_valid(batch["valid"])
        moved = {k: v.to(task.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        values = compute(moved).float().cpu().numpy()
        for sample, usable, found in zip(samples, valid, values):
            yield from _rows_of(sample, usable, found, per_frame)


def _rows_of(sample: dict, usable: Tensor, values: np.ndarray, per_frame: bool) -> Iterator[Row]:
    """Rows of a sample: usable (T,), values (D,), or (T, D) with `per_frame`."""
    days = sample["dates"].numpy().astype("datetime64[D]")
    window, label = sample.get("window"), sample.get("label")
    place = None if window is None else (int(window[0]), int(window[1]))
    high, wide = sample["image"].shape[2:]
    if label is not None and label.ndim != per_frame:
        label = None
    for t in range(len(days)) if per_frame else [None]:
        part = slice(None) if t is None else slice(t, t + 1)
        row = None
        if usable[: len(days)][part].any():
            row = values if t is None else values[t]
            if not np.isfinite(row).all():
                raise DataError(
                    f"series {sample['name']}: the model gives values that are not finite; its "
                    "training may have diverged (logs/metrics.csv), or pixels lie far beyond those "
                    "that it was trained on"
                )
        one = None if label is None else int(label if t is None else label[t])
        yield Row(sample["name"], place, (high, wide), one, days[part][0], days[part][-1], row)


def embed_series(
    task: SeriesTask,
    dataset: SeriesDataset,
    per_frame: bool = False,
    batch_size: int = 4,
) -> dict[str, np.ndarray]:
    """Embeddings: the mean of the encoder's last map over the valid tokens of a series or a date.

    The encoder of a pretraining run attends as it was trained, jointly in every stage, over all
    tokens of a sample.

    Args:
        task: a task of any kind in evaluation mode, on the device to run on; see `load_run`.
        dataset: what `task` is to read.
        per_frame: a row for every date, not for the series.
        batch_size: samples at once, of one image size.

    Returns:
        embedding (R, D) float32, NaN where no pixel is valid; name (R,); start and end (R,)
        datetime64[D]; window (R, 2) int64, upper left pixels, where samples were cut from rasters;
        of georeferenced rasters bounds (R, 4) float64, left, bottom, right and top in the
        coordinates of crs (R,), as EPSG:32718, or WKT where it has no code;
        label (R,) int64, 255 where there is none, if any sample has one of what a row is.

    Raises:
        DataError, ValueError: see `table_rows`; or the dataset is empty.
    """
    encoder: Any = task.model.encoder

    def compute(batch: dict) -> Tensor:
        frames = physical(batch["image"], *task.input_units())
        maps, valids = encoder.features(frames, batch["dates"], batch["valid"])
        return mean_of_valid(maps[-1], valids[-1], per_frame)

    rows = list(table_rows(compute, task, dataset, per_frame, batch_size, "embed"))
    if not rows:
        raise DataError("data: holds no samples, so there is nothing to embed")
    none = np.full(encoder.embed_dims[-1], np.nan, np.float32)
    table = {
        "embedding": np.stack([none if row.values is None else row.values for row in rows]),
        "name": np.array([row.name for row in rows]),
        "start": np.array([row.start for row in rows]),
        "end": np.array([row.end for row in rows]),
    }
    windows, labels = [row.window for row in rows], [row.label for row in rows]
    if None not in windows:
        table["window"] = np.array(windows, np.int64)
    if isinstance(dataset, WindowedSeries) and all(s.crs for s in dataset.series):
        transforms = {series.name: series.transform for series in dataset.series}
        systems = {series.name: series.crs.to_string() for series in dataset.series}
        table["bounds"] = np.array([_bounds(row, transforms[row.name]) for row in rows])
        table["crs"] = np.array([systems[row.name] for row in rows])
    if any(label is not None for label in labels):
        known = [IGNORE_INDEX if label is None else label for label in labels]
        table["label"] = np.array(known, np.int64)
    return table


def _bounds(row: Row, transform: Any) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a row's pixels by the affine transform of its raster."""
    top, left = row.window or (0, 0)
    corners = [transform * (left + x, top + y) for x in (0, row.size[1]) for y in (0, row.size[0])]
    across, along = zip(*corners)
    return min(across), min(along), max(across), max(along)


def predict_classes(
    task: ClassificationTask, dataset: SeriesDataset, out: str | Path, batch_size: int = 4
) -> None:
    """Write the class of every series, or with `per_frame` of every date, as CSV (UTF-8).

    Columns: name, row and column (upper left pixel, where samples were cut from rasters), start and
    end (dates), class, and the probability of each class. Class and probabilities are empty where
    no pixel is valid.

    Args:
        task: the classifier in evaluation mode, on the device to run on.
        dataset, batch_size: see `embed_series`.
        out: the file; it appears complete or not at all.

    Raises:
        DataError, ValueError: see `table_rows`.
    """

    def compute(batch: dict) -> Tensor:
        return task(batch).float().softmax(-1)

    rows = table_rows(compute, task, dataset, task.per_frame, batch_size, "predict")
    with (
        atomic_output(out) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "row", "column", "start", "end", "class", *task.classes])
        for row in rows:
            found = ["", *[""] * len(task.classes)]
            if row.values is not None:
                shares = [f"{share:.6f}" for share in row.values.tolist()]
                found = [task.classes[int(row.values.argmax())], *shares]
            writer.writerow([row.name, *(row.window or ("", "")), row.start, row.end, *found])
