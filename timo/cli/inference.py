"""`timo evaluate`, `timo predict` and `timo embed`."""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer

from timo.cli.parsing import series_parser
from timo.data import SeriesDataset
from timo.data.contract import atomic_output
from timo.data.dates import parse_date
from timo.data.series import WindowedSeries
from timo.tasks import (
    ClassificationTask,
    SeriesData,
    embed_series,
    load_run,
    load_segmenter,
    load_task,
    predict_classes,
    predict_series,
)
from timo.tasks.base import SeriesTask, read_description
from timo.tasks.maps import embed_map
from timo.tasks.pictures import (
    Colour,
    change_colours,
    class_colours,
    confusion_picture,
    embedding_picture,
    save,
)
from timo.tasks.prediction import change_names, dates_of_change
from timo.tasks.runs import TASK, environment, interruptible, write_json, write_text


def evaluate(arguments: Sequence[str]) -> int:
    """Measure a fine-tuned model on labelled series: IoU (of maps), F1, accuracy.

    Pixels count once where windows overlap. A class that neither occurs nor is predicted has the
    score nan, in the JSON file null. The file also holds how often labels of each class (rows) were
    predicted as each class (columns), which a picture beside it shows.
    """
    parser = series_parser("timo evaluate", evaluate.__doc__)
    _add_run(parser)
    parser.add_argument("--data", type=SeriesDataset, required=True, help="labelled series")
    _add_batches(parser)
    parser.add_argument("--out", type=str, default=None, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    out = Path(options.out) if options.out else None
    if out and (out.suffix == ".png" or out.is_dir()):
        raise ValueError(f"out is {out}; name a JSON file, a picture is written beside it")
    if out and not out.parent.is_dir():
        raise ValueError(f"out is {out}, but there is no folder {out.parent}; create it first")
    dataset = parser.instantiate(options).data
    task = load_task(options.run, dataset, options.best)
    trainer = Trainer(accelerator=options.accelerator, logger=False, devices=1)
    data = SeriesData(test=dataset, batch_size=options.batch_size)
    with interruptible(trainer):
        (figures,) = trainer.test(task, datamodule=data, verbose=False)
    for name, value in figures.items():
        print(f"{name.removeprefix('test/'):24s} {value:.4f}")
    if out:
        # JSON has no NaN.
        known = {k: v if math.isfinite(v) else None for k, v in figures.items()}
        counts = task.confusion.compute().cpu().numpy().reshape(2 * (len(task.classes),))
        confusion = {"classes": task.classes, "counts": counts.tolist()}
        asked = json.loads(parser.dump(options, format="json", skip_unset=True))
        about = {"confusion": confusion, "options": asked, "data": data.splits()["test"]}
        write_json(out, known | about)
        picture = out.with_name(f"{out.name.removesuffix('.json')}.png")
        save(confusion_picture(counts, task.classes), picture)
    return 0


def predict(arguments: Sequence[str]) -> int:
    """Map every series of a data set to GeoTIFF: labels, optionally changes and probabilities.

    A classification run lists the class of every series, or date, in predictions.csv instead.
    """
    parser = series_parser("timo predict", predict.__doc__)
    _add_run(parser)
    parser.add_argument(
        "--data", type=SeriesDataset, required=True, help="for maps: series, not cut into tiles"
    )
    parser.add_argument(
        "--tile", type=int | None, default=None, help="of maps: window size in pixels, 224"
    )
    parser.add_argument(
        "--overlap", type=int | None, default=None, help="of maps: pixels that windows share, 32"
    )
    _add_batches(parser)
    parser.add_argument("--out", type=str, required=True, help="folder of the results")
    parser.add_argument(
        "--change", type=bool | list[int | str], default=False,
        help="also <series>_change.tif, from the first date to the last, or between two dates: "
        "[2019-07-01, 2020-07-01]",
    )  # fmt: skip
    parser.add_argument(
        "--probabilities", type=bool, default=False, help="also <series>_probabilities.tif"
    )
    options = parser.parse_args(arguments)
    if (Path(options.run) / TASK).is_file():
        if read_description(Path(options.run) / TASK).get("kind") == ClassificationTask.kind:
            return _list_classes(parser, options)
    tile = 224 if options.tile is None else options.tile
    overlap = 32 if options.overlap is None else options.overlap
    if tile < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1, in pixels")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}; it must be from 0 to less than tile, {tile}")
    _require_whole(options)
    given = options.data.init_args
    asked = options.clone()
    given.tile, given.stride = tile, tile - overlap
    dataset = parser.instantiate(options).data
    task = load_segmenter(options.run, dataset, options.best).to(_device(options.accelerator))
    between, changes = None, options.change is not False
    if isinstance(options.change, list):
        between = [str(parse_date(str(date)).astype("datetime64[D]")) for date in options.change]
    for series in dataset.series if changes else ():
        dates_of_change(task, series, between)
    endings = ["", *["_change"] * changes, *["_probabilities"] * options.probabilities]
    names = Counter(series.name + ending for series in dataset.series for ending in endings)
    if double := [name for name, n in names.items() if n > 1]:
        raise ValueError(
            f"data: two results would be called {double[0]}.tif, by the names of the series; "
            "rename a folder, or map the series one at a time (data.samples)"
        )
    out = _folder(options)
    _record(parser, asked, out)
    for number, series in enumerate(dataset.series):
        path, picture = out / f"{series.name}.tif", out / f"{series.name}.png"
        change = out / f"{series.name}_change.tif" if changes else None
        shares = out / f"{series.name}_probabilities.tif" if options.probabilities else None
        predict_series(
            task, dataset, path, overlap, number, change, options.batch_size, shares, between,
            picture,
        )  # fmt: skip
        drawn = change and change.with_suffix(".png")
        print(*filter(None, (path, picture, change, drawn, shares)), sep="\n")
    legend = {
        "labels": dict(enumerate(task.classes)),
        "colours": _hexadecimal(class_colours(len(task.classes))),
        "nodata": 255,
    }
    if changes:
        legend["change"] = dict(enumerate(change_names(task.classes)))
        legend["change_colours"] = _hexadecimal(change_colours(len(task.classes)))
    write_json(out / "legend.json", legend)
    print(out / "legend.json")
    return 0


def _hexadecimal(colours: list[Colour]) -> dict[int, str]:
    return {i: f"#{bytes(colour).hex()}" for i, colour in enumerate(colours)}


def _require_whole(options: Namespace) -> None:
    """ValueError unless the data are series that can be mapped whole."""
    module, _, name = options.data.class_path.rpartition(".")
    if not issubclass(getattr(import_module(module), name), WindowedSeries):
        raise ValueError(
            f"data is {options.data.class_path}, which is not cut into windows; only RasterSeries "
            "and NumpySeries are mapped"
        )
    for name in ("region", "min_valid", "tile", "stride"):
        if value := options.data.init_args[name]:
            raise ValueError(
                f"data.{name} is {value}; series are mapped whole, in windows of --tile pixels: "
                "leave it out"
            )


def _list_classes(parser: ArgumentParser, options: Namespace) -> int:
    for name in ("change", "probabilities", "tile", "overlap"):
        if options[name] is not None and options[name] is not False:
            raise ValueError(
                f"{name} is {options[name]}, which is of maps; a classification run lists the "
                "classes of samples as the data cuts them (data.tile), with their probabilities: "
                "leave it out"
            )
    dataset = parser.instantiate(options).data
    task = load_task(options.run, dataset, options.best).to(_device(options.accelerator))
    assert isinstance(task, ClassificationTask)  # as task.json says
    out = _folder(options)
    _record(parser, options, out)
    predict_classes(task, dataset, out / "predictions.csv", options.batch_size)
    print(out / "predictions.csv")
    return 0


def embed(arguments: Sequence[str]) -> int:
    """Write a vector for every series, window or date, of a pretrained or fine-tuned encoder.

    embeddings.npz holds them beside names, dates, windows and labels; embeddings.png shows their
    principal components. Maps are a GeoTIFF for every series instead, with a vector for each token.
    """
    parser = series_parser("timo embed", embed.__doc__)
    _add_run(parser, "folder of `timo pretrain` or `timo finetune`")
    parser.add_argument("--data", type=SeriesDataset, required=True, help="series or windows")
    parser.add_argument(
        "--per_frame", type=bool, default=False, help="a vector for every date, not for the series"
    )
    parser.add_argument(
        "--maps", type=bool, default=False, help="<series>_embedding.tif of series, not vectors"
    )
    parser.add_argument(
        "--stage", type=int | None, default=None,
        help="of maps: stage of the encoder, 1 to 4, with tokens of 4, 8, 16 or 32 pixels; 4",
    )  # fmt: skip
    parser.add_argument(
        "--tile", type=int | None, default=None, help="of maps: window size in pixels, 96"
    )
    parser.add_argument(
        "--overlap", type=int | None, default=None, help="of maps: pixels that windows share, 32"
    )
    _add_batches(parser)
    parser.add_argument("--out", type=str, required=True, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.maps:
        if options.per_frame:
            raise ValueError("per_frame is true; maps are of series, leave it out")
        _require_whole(options)
    elif stated := [name for name in ("stage", "tile", "overlap") if options[name] is not None]:
        raise ValueError(
            f"{stated[0]} is {options[stated[0]]}, which is of maps; pass --maps true, or leave it "
            "out (data.tile cuts windows)"
        )
    dataset = parser.instantiate(options).data
    task = load_run(options.run, dataset, options.best).to(_device(options.accelerator))
    out = _folder(options)
    _record(parser, options, out)
    if options.maps:
        _embed_maps(task, dataset, options, out)
        return 0
    table = embed_series(task, dataset, options.per_frame, options.batch_size)
    drawn = embedding_picture(table)
    with atomic_output(out / "embeddings.npz") as partial:
        np.savez(partial, **table)  # type: ignore[arg-type]
    save(drawn, out / "embeddings.png")
    rows, channels = table["embedding"].shape
    print(f"{rows} embeddings of {channels} channels are in {out / 'embeddings.npz'}")
    return 0


def _embed_maps(task: SeriesTask, dataset: WindowedSeries, options: Namespace, out: Path) -> None:
    given = {name: options[name] for name in ("stage", "tile", "overlap")}
    given = {name: value for name, value in given.items() if value is not None}
    for number, series in enumerate(dataset.series):
        path, picture = out / f"{series.name}_embedding.tif", out / f"{series.name}_embedding.png"
        embed_map(
            task, dataset, path, number, batch_size=options.batch_size, picture=picture, **given
        )
        print(path, picture, sep="\n")


def _record(parser: ArgumentParser, options: Namespace, out: Path) -> None:
    write_text(out / "config.yaml", parser.dump(options, skip_unset=True))
    write_json(out / "environment.json", environment())


def _folder(options: Namespace) -> Path:
    """`out`, made where it is not there; ValueError where nothing may be written to it."""
    out = Path(options.out)
    read = options.data.init_args
    data = read.get("root") or read.get("path")
    if data and Path(data).resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"out: {out} lies in the folder of the data, {data}, where results would be taken for "
            "series; name another"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; name a folder")
    if (out / TASK).is_file():
        raise ValueError(f"out: {out} is the folder of a run, with its own records; name another")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"out: {out} may not be written to; name another folder")
    return out


def _device(accelerator: str) -> torch.device:
    """Where `accelerator` says that tasks run; ValueError where there is none such."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator is {accelerator!r}; it must be cpu, gpu or auto")
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    if accelerator == "gpu" and not gpu:
        raise ValueError("accelerator is gpu, but torch sees none; use cpu or auto")
    return torch.device("cuda" if gpu else "cpu")


def _add_batches(parser: ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto")


def _add_run(parser: ArgumentParser, help: str = "folder of `timo finetune`") -> None:
    parser.add_argument("--run", type=str, required=True, help=help)
    parser.add_argument(
        "--best", type=bool, default=False,
        help="weights of the least validation loss, not those of the last epoch",
    )  # fmt: skip
