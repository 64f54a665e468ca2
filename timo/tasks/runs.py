"""A run's folder: configuration, environment, seed and results side by side."""

import copy
import json
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from timo import load_checkpoint, save_checkpoint
from timo.data import DataError
from timo.data.contract import atomic_output
from timo.models.checkpoint import read_checkpoint
from timo.tasks.base import SeriesTask, read_description
from timo.tasks.data import SeriesData

MODEL, BEST, TASK = "model.safetensors", "best.safetensors", "task.json"
LAST, BEST_STATE = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
# What lies in the folder of a run that has no checkpoint yet.
STARTED = {"config.yaml", "environment.json", "splits.json", TASK, "logs", "checkpoints"}


def fit(
    task: SeriesTask,
    data: SeriesData,
    out: Path,
    resume: bool = False,
    config: str | None = None,
    **options,
) -> Trainer:
    """Train a task and leave configuration, checkpoints, logs and the model's weights in `out`.

    With several processes, that of global rank 0 alone writes.

    Args:
        task, data: what to train, on what.
        out: the run's folder. A new run takes an empty one, or one of a run that stopped before
            its first checkpoint, which it replaces.
        resume: go on from the last checkpoint in `out`.
        config: what config.yaml is to hold; there is none if None.
        options: of `lightning.Trainer`, as max_epochs, precision, accelerator.

    Returns:
        The trainer. `out` then holds model.safetensors and task.json (see `save_model`),
        best.safetensors where `data` has a validation part, logs/metrics.csv, TensorBoard's
        events, checkpoints/last.ckpt to resume from, environment.json, and splits.json: what it
        learned from and watched, with the hashes of published splits. A resumed run writes
        config_2.yaml, environment_2.json, splits_2.json and logs_2 beside those of the first.

    Raises:
        ValueError: the folder holds a run already, or none to resume, or one of another model.
        KeyboardInterrupt: the run was stopped.
    """
    suffix = _suffix(out) if resume else ""
    folder = out / "checkpoints"
    keep: dict[str, Any] = {"enable_version_counter": False}
    callbacks = [
        ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, **keep),
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
            CSVLogger(out, name="", version=f"logs{suffix}"),  # it would empty an old one
            TensorBoardLogger(out, name="", version="logs"),
        ],
        callbacks=callbacks,
    )
    if resume:
        _check_resumable(task, out, trainer)
        # Checkpoints are of the end of an epoch. With max_steps Lightning would take them for the
        # middle of one, and end that epoch again.
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    if trainer.is_global_zero:
        if not resume:
            _clear(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"environment{suffix}.json", environment(data.seed))
        write_json(out / f"splits{suffix}.json", data.splits())
        if config is not None:
            write_text(out / f"config{suffix}.yaml", config)
        # With it the weights of checkpoints are of use before the run ends.
        read = data.training
        described = task.description() | {"units": read.units, "nodata": read.nodata}
        if resume and (out / TASK).is_file():
            described = read_description(out / TASK)
        write_json(out / TASK, described | {"ended": False})
    checkpoint = out / LAST if resume else None
    with interruptible(trainer):
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        save_model(task, out)
    return trainer


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """KeyboardInterrupt where the user, or the system, stops what `trainer` does in the block."""
    try:
        yield
    except SystemExit:  # so Lightning ends then
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def _clear(out: Path) -> None:
    """Make way for a new run; ValueError where anything else than a mere start lies there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; name a folder")
    if not out.is_dir():
        return
    names = {path.name for path in out.iterdir()}
    started = "environment.json" in names and names <= STARTED
    if names and not (started and not list(out.glob("checkpoints/*.ckpt"))):
        remedy = ", or pass --resume true" if (out / LAST).is_file() else ""
        raise ValueError(f"out: {out} is not empty; name another folder{remedy}")
    shutil.rmtree(out / "logs", ignore_errors=True)


def _suffix(out: Path) -> str:
    """_2, _3, ...: of the files of a resumed run, after those of the runs before it."""
    return f"_{1 + len(list(out.glob('environment*.json')))}"


def _check_resumable(task: SeriesTask, out: Path, trainer: Trainer) -> None:
    """ValueError unless `out` holds a checkpoint of just this task, with something left to do."""
    if not (out / LAST).is_file():
        raise ValueError(f"resume: {out / LAST} does not exist; start without --resume")
    held_state = read_checkpoint(out / LAST)
    described = read_description(out / TASK) if (out / TASK).is_file() else {"ended": False}
    own = json.loads(json.dumps(task.description()))
    for name in ("bands", "classes", "per_frame"):
        if name in described and described[name] != own.get(name):
            raise ValueError(
                f"resume: {out} is a run of {name} {described[name]}, not {own.get(name)}; give "
                f"the options of {out / 'config.yaml'}, or start another run"
            )
    epochs, steps = held_state["epoch"] + 1, held_state["global_step"]
    for name, done, most in (
        ("max_epochs", epochs, trainer.max_epochs), ("max_steps", steps, trainer.max_steps),
    ):  # fmt: skip
        if described.get("ended", True) and most is not None and -1 < most <= done:
            raise ValueError(
                f"resume: {out} has ended after {epochs} epochs, {steps} steps, and "
                f"trainer.{name} is {most}; raise it"
            )
    held, own = held_state["state_dict"], task.state_dict()
    shapes = [{name: x.shape for name, x in state.items()} for state in (held, own)]
    if differing := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"resume: {out / LAST} is of another model, by {', '.join(differing[:3])}{more}; give "
            f"the task.* options of {out / 'config.yaml'}"
        )
    (optimizer,) = held_state["optimizer_states"]
    trained = sum(len(group["params"]) for group in optimizer["param_groups"])
    if trained != (ours := sum(x.requires_grad for x in task.parameters())):
        raise ValueError(
            f"resume: {out / LAST} is of a run that trains {trained} weights, this one trains "
            f"{ours}; give task.freeze and task.fresh as in {out / 'config.yaml'}"
        )


def environment(seed: int | None = None) -> dict:
    """Versions, device, command and, where anything is drawn, its seed."""
    packages: dict[str, str | None] = {}
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


def weights_of(run: Path, ended: bool, best: bool = False) -> Path:
    """The file of a run's last weights, or with `best` of those of the least validation loss.

    Of a run that has not ended it is a checkpoint, with a warning.

    Raises:
        DataError: there is none.
    """
    of_end, of_state = (BEST, BEST_STATE) if best else (MODEL, LAST)
    path, last = run / (of_end if ended else of_state), run / (MODEL if ended else LAST)
    if path.is_file():
        if not ended:
            warnings.warn(f"{path}: weights of a run that has not ended", stacklevel=2)
        return path
    if best and last.is_file():
        raise DataError(f"{path}: does not exist, for nothing was validated yet; omit --best")
    if ended:
        raise DataError(f"{path}: does not exist; give the folder of a run")
    raise DataError(
        f"{path}: does not exist, for the run has done no epoch; wait, or start it again"
    )


def save_model(task: SeriesTask, out: Path) -> None:
    """Write model.safetensors and task.json: all that evaluation and prediction need.

    best.safetensors is written too where checkpoints/best.ckpt tells its weights.
    """
    save_checkpoint(task.model, out / MODEL)
    if (out / BEST_STATE).is_file():
        best = copy.deepcopy(task.model)
        load_checkpoint(best, out / BEST_STATE)
        save_checkpoint(best, out / BEST)
    write_json(out / TASK, task.description())


def write_json(path: Path, record: dict) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic_output(path) as partial:
        partial.write_text(text)
