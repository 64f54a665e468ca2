"""`timo pretrain` and `timo finetune`."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only

from timo.cli.parsing import parse_training, training_parser
from timo.data import TransformedSeries
from timo.data.collate import by_date
from timo.tasks import ClassificationTask, PretrainingTask, SegmentationTask, SeriesData
from timo.tasks.base import SeriesTask
from timo.tasks.runs import LAST, fit
from timo.tasks.supervised import SupervisedTask


def pretrain(arguments: Sequence[str]) -> int:
    """Pretrain on unlabelled series."""
    parser = training_parser("timo pretrain", pretrain.__doc__, PretrainingTask, set())
    options = parse_training(parser, arguments)
    data, train = _data(parser, options)
    task = PretrainingTask(train.bands, **data.normalisation(), **options.task.as_dict())
    _train(task, data, parser, options)
    return 0


def finetune(arguments: Sequence[str]) -> int:
    """Fine-tune from pretrained weights or from scratch.

    Samples with a mask are segmented, those with a label are classified. Both tasks take the same
    options; learning_rate, weight_decay, warmup and schedule are those of the task's own recipe
    unless they are given.
    """
    parser = finetuning_parser()
    options = parse_training(parser, arguments)
    data, train = _data(parser, options)
    normalisation, sample = data.normalisation(), train[0]
    kind: type[SegmentationTask | ClassificationTask]
    kind = SegmentationTask if "mask" in sample else ClassificationTask
    if kind.target not in sample:
        raise ValueError(
            "data.train: its samples have neither mask nor label; add mask.tif, <date>_mask.tif or "
            "labels=, or for classification labels.csv"
        )
    labels = sample[kind.target]
    described = options.task.as_dict() | {"per_frame": by_date(kind.target, labels)}
    described["classes"] = described["classes"] or _classes(train)
    if not described["classes"]:
        raise ValueError('task.classes: name the classes of the labels, as ["land", "water"]')
    task = kind(train.bands, **normalisation, **described)
    for name in task.recipe:
        options.task[name] = getattr(task, name)
    if task.pretrained_report:
        rank_zero_only(print)(task.pretrained_report)
    _train(task, data, parser, options)
    return 0


def finetuning_parser() -> ArgumentParser:
    """Options of `timo finetune`, for segmentation and classification alike."""
    derived = {"per_frame", "classes"}
    parser = training_parser("timo finetune", finetune.__doc__, SupervisedTask, derived)
    parser.add_argument("--task.classes", type=list[str] | None, help="names, in label order")
    return parser


def _classes(train: TransformedSeries) -> tuple[str, ...] | None:
    """Names of the classes where the data set states them, as the simulated one does."""
    return getattr(train.dataset, "classes", None)


def _data(parser: ArgumentParser, options: Namespace) -> tuple[SeriesData, TransformedSeries]:
    seed_everything(options.seed, workers=True, verbose=False)
    data = parser.instantiate(options).data
    if data.train is None:
        raise ValueError(
            "data.train is missing; as --data.train RasterSeries --data.train.root DIR"
        )
    return data, data.train


def _train(task: SeriesTask, data: SeriesData, parser: ArgumentParser, options: Namespace) -> None:
    out = Path(options.out)
    repetition = options.clone()
    repetition.resume = False
    config = parser.dump(repetition, skip_unset=True)
    try:
        trainer = fit(task, data, out, options.resume, config, **options.trainer.as_dict())
    except KeyboardInterrupt:
        if (out / LAST).is_file():
            raise KeyboardInterrupt("the same command with --resume true goes on") from None
        raise
    if not trainer.is_global_zero:
        return
    figures = {k: v.item() for k, v in trainer.callback_metrics.items()}
    for name, value in sorted(figures.items()):
        print(f"{name:24s} {value:.5g}")
    print(f"model, configuration and logs are in {out}")
