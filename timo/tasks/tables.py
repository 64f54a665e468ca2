"""A row for every series, or for every date of one: embeddings, and classes with probabilities."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from timo.data import SeriesDataset, collate_series, physical
from timo.data.contract import atomic_output, evenly_spaced
from timo.data.page import figure
from timo.models.classifier import mean_of_valid
from timo.tasks.base import SeriesTask
from timo.tasks.classification import ClassificationTask
from timo.tasks.data import compact_valid

SHOWN = 5000  # points of a picture


@dataclass(frozen=True)
class Row:
    """One series, or one date of it.

    Attributes:
        name, window, label: as in the sample; None where it has none.
        start, end: first and last acquisition date, the same of a single date.
        values: (D,) float32, NaN where no pixel is valid.
    """

    name: str
    window: tuple[int, int] | None
    label: int | None
    start: np.datetime64
    end: np.datetime64
    values: Tensor


@torch.inference_mode()
def table_rows(
    compute: Callable[[dict], Tensor],
    dataset: SeriesDataset,
    per_frame: bool,
    device: torch.device,
    batch_size: int = 4,
    what: str = "embed",
) -> Iterator[Row]:
    """Rows of what `compute` gives for batches on `device`, in the order of the dataset.

    Args:
        compute: (B, D) of a batch, or (B, T, D) with `per_frame`.
        what: title of the progress bar.
    """

    def collate(samples: list[dict]) -> dict:
        return collate_series(samples) | {"length": [len(s["dates"]) for s in samples]}

    loader = DataLoader(dataset, batch_size, collate_fn=collate)  # type: ignore[arg-type]
    for batch in track(loader, what, transient=True):
        valid = batch["valid"].flatten(2).any(2)  # [B, T]
        moved = batch | {"valid": compact_valid(batch["valid"])}
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        values = compute(moved).float().cpu()
        days = batch["dates"].numpy().astype("datetime64[D]")
        for i, (name, length) in enumerate(zip(batch["name"], batch["length"])):
            window = tuple(batch["window"][i]) if "window" in batch else None
            label = batch["label"][i] if "label" in batch else None
            spans = [(t, t) for t in range(length)] if per_frame else [(0, length - 1)]
            for first, last in spans:
                row = values[i, first] if per_frame else values[i]
                usable = valid[i, first : last + 1].any()
                one = None if label is None or label.ndim != per_frame else label
                yield Row(
                    name, window, None if one is None else int(one[first] if per_frame else one),
                    days[i, first], days[i, last], row.where(usable, torch.nan),
                )  # fmt: skip


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
        dataset: what `task` reads.
        per_frame: a row for every date, not for the series.
        batch_size: samples at once, of one image size.

    Returns:
        embedding (R, D) float32, NaN where no pixel is valid; name (R,); start and end (R,)
        datetime64[D]; window (R, 2) int64, upper left pixels, where samples were cut from rasters;
        label (R,) int64, 255 where there is none, where samples have labels of what a row is.
    """

    encoder: Any = task.model.encoder

    def compute(batch: dict) -> Tensor:
        frames = physical(batch["image"], *task.input_units())
        maps, valids = encoder.features(frames, batch["dates"], batch["valid"])
        return mean_of_valid(maps[-1], valids[-1], per_frame)

    rows = list(table_rows(compute, dataset, per_frame, task.device, batch_size))
    table = {
        "embedding": torch.stack([row.values for row in rows]).numpy(),
        "name": np.array([row.name for row in rows]),
        "start": np.array([row.start for row in rows]),
        "end": np.array([row.end for row in rows]),
    }
    for name in ("window", "label"):
        column = [getattr(row, name) for row in rows]
        if None not in column:
            table[name] = np.array(column, np.int64)
    return table


def predict_classes(
    task: ClassificationTask, dataset: SeriesDataset, out: str | Path, batch_size: int = 4
) -> None:
    """Write the class of every series, or with `per_frame` of every date, as CSV.

    Columns: name, row and column (upper left pixel, where samples were cut from rasters), start and
    end (dates), class, and the probability of each class. Class and probabilities are empty where
    no pixel is valid.

    Args:
        task: the classifier in evaluation mode, on the device to run on.
        dataset, batch_size: see `embed_series`.
        out: the file; it appears complete or not at all.
    """

    def compute(batch: dict) -> Tensor:
        return task(batch).float().softmax(-1)

    rows = table_rows(compute, dataset, task.per_frame, task.device, batch_size, "predict")
    with atomic_output(out) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "row", "column", "start", "end", "class", *task.classes])
        for row in rows:
            found = ["", *[""] * len(task.classes)]
            if not row.values.isnan().any():
                shares = [f"{share:.6f}" for share in row.values.tolist()]
                found = [task.classes[int(row.values.argmax())], *shares]
            writer.writerow([row.name, *(row.window or ("", "")), row.start, row.end, *found])


def picture(table: dict[str, np.ndarray], out: str | Path) -> None:
    """Write the first two principal components of embeddings as PNG.

    Points are coloured by label where there is one, else by date.

    Args:
        table: as from `embed_series`; of many rows `SHOWN` are drawn, evenly spaced.
        out: the file; its suffix must be .png.

    Raises:
        ImportError: without matplotlib.
    """
    known = np.flatnonzero(np.isfinite(table["embedding"]).all(1))
    chosen = known[evenly_spaced(len(known), SHOWN)]
    x = torch.from_numpy(table["embedding"][chosen]).double()
    plot, (axes,) = figure(1, 1, 7, 6)
    if len(x):
        x = x - x.mean(0)
        left, spread, _ = torch.linalg.svd(x, full_matrices=False)
        points = torch.zeros(len(x), 2).double()
        points[:, : len(spread)] = (left * spread)[:, :2]
        share = spread**2 / (spread**2).sum().clamp_min(torch.finfo(x.dtype).tiny)
        labelled = "label" in table
        colour = table["label"] if labelled else table["start"].astype("datetime64[D]").astype(int)
        dots = axes.scatter(
            *points.T.numpy(), c=colour[chosen] if labelled else 1970 + colour[chosen] / 365.25,
            s=10, cmap="tab20" if labelled else "viridis",
        )  # fmt: skip
        plot.colorbar(dots, ax=axes, label="label" if labelled else "first date (year)")
        for axis, number in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
            part = f", {share[number]:.0%} of variance" if number < len(share) else ""
            axis(f"principal component {number + 1}{part}")
    axes.set_title(f"{len(chosen)} of {len(table['name'])} embeddings")
    with atomic_output(out) as partial:
        plot.savefig(partial, dpi=150)
