"""`timo demo`: pretraining, fine-tuning, evaluation and maps on one real series, with a report."""

import argparse
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from timo.cli.report import write_report
from timo.data import RasterSeries, open_water
from timo.tasks import (
    PretrainingTask,
    SegmentationTask,
    SeriesData,
    load_segmenter,
    predict_series,
)
from timo.tasks.runs import MODEL, environment, fit, write_json

CLASSES = ("land", "water")
WEST, EAST = (0.0, 0.0, 1.0, 0.6), (0.0, 0.6, 1.0, 1.0)
TILE, OVERLAP = 96, 32
TINY_DECODER = {"decoder_embed_dim": 192, "decoder_num_heads": 6, "decoder_depth": 2}


def demo(arguments: Sequence[str]) -> int:
    """Map open water at Pucallpa, Peru, 1985 to 2020, from Landsat composites.

    Pretrains timo_tiny on the western part of the series, fine-tunes it there on water masks
    derived from a spectral index, measures it on the eastern part beside the same model trained
    from scratch, maps the whole raster and writes report.html. Where the real series is absent it
    simulates one.
    """
    parser = argparse.ArgumentParser("timo demo", description=demo.__doc__)
    parser.add_argument(
        "--data", default=None, help="folder pucallpa_landsat of the real series, or the one above"
    )
    parser.add_argument("--out", default="runs/demo", help="folder of the results; replaced")
    parser.add_argument("--pretrain_steps", type=int, default=500)
    parser.add_argument("--finetune_steps", type=int, default=100)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    root, source = _find_series(options.data, out)
    print(f"series: {source}")

    timings: dict[str, float] = {}
    seed_everything(0, workers=True, verbose=False)
    with _Step("pretraining", timings):
        west = _open(root, WEST, stride=TILE // 2)
        data = SeriesData(west, batch_size=8, dates=4)
        pretraining = PretrainingTask(
            west.bands, **data.normalisation(), model="timo_tiny",
            model_options={"pixel_norm": "none", **TINY_DECODER}, learning_rate=4e-4,
        )  # fmt: skip
        _fit(pretraining, data, out / "pretraining", options.pretrain_steps)

    east = _open(root, EAST, labels=open_water)
    measured = SeriesData(test=east, batch_size=2)
    scores = {}
    for name, weights in (("pretrained", str(out / "pretraining" / MODEL)), ("from scratch", None)):
        run = out / name.replace(" ", "_")
        with _Step(f"fine-tuning, {name}", timings):
            seed_everything(1, workers=True, verbose=False)
            west = _open(root, WEST, stride=TILE // 2, labels=open_water)
            data = SeriesData(west, batch_size=4, dates=2, seed=1)
            task = SegmentationTask(
                west.bands, **data.normalisation(), classes=CLASSES, per_frame=True,
                model="timo_tiny", pretrained=weights, learning_rate=5e-4, warmup=0.1,
                schedule="cosine",
            )  # fmt: skip
            _fit(task, data, run, options.finetune_steps)
        with _Step(f"evaluation, {name}", timings):
            trainer = Trainer(accelerator="cpu", logger=False, **_QUIET)
            (scores[name],) = trainer.test(task, datamodule=measured, verbose=False)
    with _Step("prediction", timings):
        whole = _open(root, None, stride=TILE - OVERLAP)
        task = load_segmenter(out / "pretrained", whole)
        maps = out / "water.tif", out / "change.tif"
        predict_series(task, whole, maps[0], OVERLAP, change=maps[1])
    with _Step("report", timings):
        figures = {
            "source": source,
            "steps": {"pretraining": options.pretrain_steps, "fine-tuning": options.finetune_steps},
            "east": scores,
            "seconds": timings,
            "environment": environment(0),
        }
        write_json(out / "figures.json", figures)
        write_report(out, root, figures, pretraining.eval(), east)
    _print_scores(scores)
    print(f"maps: {maps[0]}, {maps[1]}\nreport: {out / 'report.html'}")
    print(f"done in {time.perf_counter() - started:.0f} s")
    return 0


def _find_series(given: str | None, out: Path) -> tuple[Path, str]:
    """Folder of rasters and what it is."""
    roots = [given] if given else [os.environ.get("TIMO_DATA"), "../shared/data"]
    for root in filter(None, roots):
        for folder in (Path(root), Path(root) / "pucallpa_landsat"):
            if folder.resolve().name == "pucallpa_landsat" and folder.is_dir():
                return folder, "Landsat composites of the Ucayali river at Pucallpa, Peru (real)"
    if given:
        raise ValueError(
            f"data: {given} neither is nor holds a folder pucallpa_landsat; leave --data out"
        )
    from timo.cli.simulated_scene import write_scene

    return write_scene(out / "simulated"), "a simulated river landscape (no real series found)"


def _open(root: Path, region, **options) -> RasterSeries:
    bands = ("SWIR1", "NIR", "Red", "Green")
    return RasterSeries(
        root, bands=bands, nodata=0, tile=TILE, region=region, cache=True, **options
    )


_QUIET: dict[str, Any] = {"enable_model_summary": False, "devices": 1}


def _fit(task, data: SeriesData, out: Path, steps: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    fit(
        task, data, out, max_steps=steps, max_epochs=-1, accelerator="cpu", log_every_n_steps=1,
        gradient_clip_val=1.0, **_QUIET,
    )  # fmt: skip


class _Step:
    """Announces a step and keeps its duration."""

    def __init__(self, name: str, timings: dict[str, float]):
        self.name, self.timings = name, timings

    def __enter__(self) -> None:
        print(f"== {self.name}", flush=True)
        self.started = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.timings[self.name] = round(time.perf_counter() - self.started, 1)


def _print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    print("\nopen water on the eastern part, which no model was trained on")
    print(f"{'':14s}{'IoU':>8s}{'F1':>8s}{'accuracy':>10s}")
    for name, score in scores.items():
        iou, f1 = score["test/iou/water"], score["test/f1/water"]
        print(f"{name:14s}{iou:8.4f}{f1:8.4f}{score['test/accuracy']:10.4f}")
