"""Maps from a trained segmenter: window by window, blended, written as GeoTIFF."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import nan
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from timo import load_checkpoint
from timo.data import IGNORE_INDEX, DataError, GeoTiffWriter, blend, collate_series
from timo.data.contract import SeriesDataset, evenly_spaced, with_progress
from timo.data.series import Series, WindowedSeries
from timo.tasks.base import SeriesTask, read_description
from timo.tasks.classification import ClassificationTask
from timo.tasks.data import compact_valid
from timo.tasks.pictures import MAPS, PIXELS, change_colours, class_colours, map_picture, save
from timo.tasks.pretraining import PretrainingTask
from timo.tasks.runs import TASK, weights_of
from timo.tasks.segmentation import SegmentationTask
from timo.tasks.supervised import SupervisedTask

# By what task.json says of them.
KINDS: dict[str | None, type] = {
    None: PretrainingTask,
    **{task.kind: task for task in (SegmentationTask, ClassificationTask)},
}


def load_run(run: str | Path, dataset: SeriesDataset, best: bool = False) -> SeriesTask:
    """The task that a run left, in evaluation mode, set to read `dataset`'s raw units.

    Args:
        run: folder of `timo pretrain` or `timo finetune`. The weights of a run that has not ended
            are those of its last checkpoint.
        dataset: what it will read; must have the bands and units that it was trained on.
        best: take the weights of the least validation loss, not the last ones.

    Raises:
        DataError: the folder holds no run, or none with weights, or bands or units differ.

    Warns where the run has not ended, where the values of `dataset` lie far from those that it was
    trained on, and where it has no nodata value but training had one.
    """
    run = Path(run)
    if not (run / TASK).is_file():
        raise DataError(f"{run / TASK}: does not exist; give the folder of a run")
    described = read_description(run / TASK)
    weights = weights_of(run, described.pop("ended", True), best)
    kind, units = described.pop("kind", None), described.pop("units", None)
    nodata = described.pop("nodata", None)
    if kind not in KINDS or (kind is None) == ("classes" in described):
        raise DataError(
            f"{run / TASK}: is damaged (kind is {kind!r}), or of another version of timo; copy it "
            "again from its run"
        )
    bands = len(described["bands"])
    try:
        task = KINDS[kind](scale=[1.0] * bands, offset=[0.0] * bands, **described)
    except (TypeError, ValueError) as error:
        raise DataError(f"{run / TASK}: is damaged ({error}); copy it again") from error
    task.units, task.nodata = units, nodata
    task.read_from(dataset)
    task.warn_of_nodata(dataset)
    task.warn_of_range(dataset)
    report = load_checkpoint(task.model, weights)
    if others := [*report.left_out, *report.missing_expected]:
        raise DataError(
            f"{weights}: is not of this run, by {others[0]} and {len(others) - 1} more; copy it "
            f"again from where {TASK} came from"
        )
    return task.eval()


def load_task(run: str | Path, dataset: SeriesDataset, best: bool = False) -> SupervisedTask:
    """As `load_run`; DataError where the run is of pretraining, which knows no classes."""
    task = load_run(run, dataset, best)
    if not isinstance(task, SupervisedTask):
        raise DataError(f"{Path(run) / TASK}: is of a pretraining run; fine-tune it with labels")
    return task


def load_segmenter(run: str | Path, dataset: SeriesDataset, best: bool = False) -> SegmentationTask:
    """As `load_task`; DataError where the run's model gives no maps."""
    task = load_task(run, dataset, best)
    if not isinstance(task, SegmentationTask):
        raise DataError(f"{Path(run) / TASK}: is of a {task.kind} run, which maps nothing")
    return task


@torch.inference_mode()
def predict_strips(
    task: SegmentationTask, dataset: WindowedSeries, number: int, overlap: int, batch_size: int = 4
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Label maps of one series and their logits, in strips from top to bottom.

    Args:
        task: the segmenter, on the device to run on.
        dataset: windows of `timo.data.RasterSeries` or `NumpySeries`, neighbours sharing
            `overlap` pixels, where logits are blended.
        number: which series of the dataset.
        overlap: pixels that neighbouring windows share.
        batch_size: windows at once.

    Yields:
        (row, labels, logits): uint8 (T, n, W) and float32 (T, classes, n, W) per frame, 255 and
        NaN where the pixel is not valid at that date; or (1, ...), where it is at no date.
    """
    series = dataset.series[number]
    windows_of_series = Subset(dataset, dataset.windows_of(number))
    loader = DataLoader(windows_of_series, batch_size, collate_fn=collate_series)

    def windows() -> Iterator[tuple[int, int, Tensor]]:
        for batch in with_progress(loader, f"predict {series.name}"):
            # Without what pads a window to more than the raster, over which the head would pool.
            batch["image"] = batch["image"][..., : series.height, : series.width]
            valid = batch["valid"][..., : series.height, : series.width]
            batch["valid"] = compact_valid(valid)
            moved = {k: v.to(task.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            logits = task(moved).float().cpu()  # [B, (T,) classes, H, W]
            if not task.per_frame:
                logits, valid = logits[:, None], valid.any(1, keepdim=True)
            stacked = torch.cat([logits, valid.float().unsqueeze(-3)], -3)
            for (row, col), values in zip(batch["window"], stacked):
                yield row, col, values

    for row, strip in blend(windows(), series.height, series.width, overlap):
        logits, unusable = strip[:, :-1], strip[:, -1] < 0.5
        labels = logits.argmax(1).to(torch.uint8).masked_fill_(unusable, IGNORE_INDEX)
        yield row, labels, logits.masked_fill_(unusable[:, None], nan)


def predict_series(
    task: SegmentationTask,
    dataset: WindowedSeries,
    out: str | Path,
    overlap: int,
    number: int = 0,
    change: str | Path | None = None,
    batch_size: int = 4,
    probabilities: str | Path | None = None,
    between: Sequence[str] | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write the label map of one series as GeoTIFF, and optionally what changed and how sure.

    Args:
        task, dataset, overlap, number, batch_size: see `predict_strips`.
        out: GeoTIFF, uint8, nodata 255: a band for each date (per frame), or one band.
        change: GeoTIFF of change between two dates, uint8, nodata 255: label at the earlier one *
            classes + label at the later one. Needs a model that predicts per frame.
        probabilities: GeoTIFF, float32, nodata NaN, of the softmax of the logits whose greatest is
            the label: a band for each class, per frame all classes of a date after the other.
        between: the two acquisition dates of `change`, as 2020-01-31; None for first and last.
        picture: PNG of the map, small; of many dates some, evenly spaced. One of the change lies
            beside `change` then, as .png.

    Raises:
        ValueError: see `dates_of_change`.
    """
    series, classes = dataset.series[number], len(task.classes)
    days = [str(d) for d in series.dates.astype("datetime64[D]")]
    first, last = dates_of_change(task, series, between) if change else (0, -1)
    span = f"{days[0]} to {days[-1]}"
    bands = days if task.per_frame else [span]
    colours = class_colours(classes)
    step = -(-max(series.height, series.width) // PIXELS)  # of pixels in the picture
    shown, small, changed = evenly_spaced(len(bands), MAPS), [], []
    with ExitStack() as stack:

        def opened(
            path: str | Path, names: list[str], dtype: str, nodata: float, colours=None
        ) -> GeoTiffWriter:
            shape = (len(names), series.height, series.width)
            where = series.crs, series.transform
            return stack.enter_context(
                GeoTiffWriter(path, shape, dtype, *where, nodata, names, colours)
            )

        single = colours if len(bands) == 1 else None
        labels_file = opened(out, bands, "uint8", IGNORE_INDEX, single)
        between_them = [f"change {days[first]} to {days[last]}"]
        change_file = change and opened(
            change, between_them, "uint8", IGNORE_INDEX, change_colours(classes)
        )
        shares_file = probabilities and opened(
            probabilities, [f"{b} {name}" for b in bands for name in task.classes], "float32", nan
        )
        for row, labels, logits in predict_strips(task, dataset, number, overlap, batch_size):
            labels_file.write(labels, row)
            small.append(labels[shown, -row % step :: step, ::step])
            if change_file:
                codes = change_codes(labels[first], labels[last], classes)
                change_file.write(codes, row)
                changed.append(codes[-row % step :: step, ::step])
            if shares_file:
                shares_file.write(logits.softmax(1).flatten(0, 1), row)
    if picture:
        panels = torch.cat(small, 1).numpy()
        drawn = map_picture(panels, [bands[i] for i in shown], task.classes, colours)
        save(drawn, picture)
    if picture and change:
        panels = torch.cat(changed)[None].numpy()
        names = change_names(task.classes)
        drawn = map_picture(panels, between_them, names, change_colours(classes))
        save(drawn, Path(change).with_suffix(".png"))


def dates_of_change(
    task: SegmentationTask, series: Series, between: Sequence[str] | None = None
) -> tuple[int, int]:
    """Positions of the two dates between which change is mapped, the earlier one first.

    Args:
        task, series: what is to be mapped.
        between: two acquisition dates, as 2020-01-31; None for the first and the last.

    Raises:
        ValueError: the model predicts one map for the series, or more than 15 classes, whose pairs
            uint8 cannot hold; or `between` is not two dates of the series.
    """
    if not task.per_frame or len(task.classes) > 15:
        raise ValueError(
            "change needs a model with per_frame=True and at most 15 classes; this one has "
            f"per_frame={task.per_frame} and {len(task.classes)} classes"
        )
    days = [str(d) for d in series.dates.astype("datetime64[D]")]
    if between is None:
        return 0, len(days) - 1
    if len({*between}) != 2 or len(between) != 2 or any(days.count(day) != 1 for day in between):
        raise ValueError(
            f"change is [{', '.join(between)}]; it must be two acquisition dates of series "
            f"{series.name}, which has {', '.join(days)} (a day that occurs twice names neither)"
        )
    first, last = sorted(map(days.index, between))
    return first, last


def change_names(classes: Sequence[str]) -> list[str]:
    """What the codes of change mean, in their order."""
    return [f"{first} to {last}" for first in classes for last in classes]


def change_codes(first: Tensor, last: Tensor, classes: int) -> Tensor:
    """uint8 first * classes + last; 255 where either is 255."""
    code = first.to(torch.int64) * classes + last
    invalid = (first == IGNORE_INDEX) | (last == IGNORE_INDEX)
    return code.masked_fill(invalid, IGNORE_INDEX).to(torch.uint8)
