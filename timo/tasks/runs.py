"""A run's folder: configuration, environment, seed and results side by side."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from timo import save_checkpoint
from timo.data.contract import atomic_output
from timo.tasks.base import SeriesTask
from timo.tasks.data import SeriesData

MODEL, TASK, CONFIG, LAST = "model.safetensors", "task.json", "config.yaml", "checkpoints/last.ckpt"
SPLITS = "splits.json"


def open_run(out: Path, config: str, seed: int, resume: bool) -> None:
    """Make the folder of a run and write what it is about to do.

    Raises:
        ValueError: the folder holds a run already, or none to resume.
    """
    if resume and not (out / LAST).is_file():
        raise ValueError(f"resume: {out / LAST} does not exist; start without --resume")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty; name another folder, or pass --resume true")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CONFIG, config)
    write_json(out / "environment.json", environment(seed))


def environment(seed: int) -> dict:
    """Versions, device, command and seed."""
    packages = {}
    for name in ("timo", "torch", "lightning", "torchmetrics", "triton", "numpy", "rasterio"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "seed": seed,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "packages": packages,
    }


def fit(task: SeriesTask, data: SeriesData, out: Path, resume: bool = False, **options) -> Trainer:
    """Train a task and leave checkpoints, logs and the model's weights in `out`.

    Args:
        task, data: what to train, on what.
        out: the run's folder; see `open_run`.
        resume: go on from the last checkpoint in `out`.
        options: of `lightning.Trainer`, as max_epochs, precision, accelerator.

    Returns:
        The trainer. `out` then holds model.safetensors and task.json (see `save_model`),
        logs/metrics.csv, TensorBoard's events, checkpoints/last.ckpt to resume from, and
        splits.json: what it learned from and watched, with the hashes of published splits.
    """
    write_json(out / SPLITS, data.splits())
    folder = out / "checkpoints"
    keep = {"enable_version_counter": False}
    callbacks = [
        ModelCheckpoint(folder, filename="last", **keep),
        LearningRateMonitor("step"),
        TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 20),
    ]
    if data.val is None:
        options |= {"limit_val_batches": 0}
    else:
        callbacks.append(ModelCheckpoint(folder, filename="best", monitor="val/loss", **keep))
    trainer = Trainer(
        **options,
        default_root_dir=out,
        logger=[
            CSVLogger(out, name="", version=_unused(out, "logs")),  # it would empty an old one
            TensorBoardLogger(out, name="", version="logs"),
        ],
        callbacks=callbacks,
    )
    checkpoint = out / LAST if resume else None
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    save_model(task, out)
    return trainer


def _unused(out: Path, name: str) -> str:
    """`name`, or name_2, name_3, ... where a resumed run has used it."""
    number = 1 + len(list(out.glob(f"{name}*")))
    return name if number == 1 else f"{name}_{number}"


def save_model(task: SeriesTask, out: Path) -> None:
    """Write model.safetensors and task.json: all that evaluation and prediction need."""
    save_checkpoint(task.model, out / MODEL)
    write_json(out / TASK, task.description())


def write_json(path: Path, record: dict) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic_output(path) as partial:
        partial.write_text(text)
