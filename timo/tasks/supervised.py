"""What segmentation and classification share: classes, loss, metrics, pretrained weights."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from timo import create_model, load_checkpoint
from timo.data import IGNORE_INDEX, DataError, physical
from timo.layers.block import DropPath
from timo.tasks.base import SeriesTask, read_description
from timo.tasks.runs import TASK

_STEM = "stage1.embed.conv"  # the layer that reads the bands
_UNNAMED = re.compile(r"band\d+")  # what a band is called where files do not say


class SupervisedTask(SeriesTask, ABC):
    """A model that gives logits of classes, and labels to compare them with.

    Subclasses say in `kind` which model of `timo.create_model` it is, in `target` which key of
    a sample holds the labels and in `recipe` how it is trained unless arguments say otherwise, and
    define `labels_of`, `flat` and `metrics`.

    Args:
        bands, mean, deviation, scale, offset, model, model_options, betas: see SeriesTask.
        learning_rate, weight_decay, warmup, schedule: see SeriesTask; as in `recipe` if None.
        classes: names of the classes, in the order of their labels; 255 is ignored.
        per_frame: labels for every date, not for the series.
        pretrained: checkpoint to start from: a run's model.safetensors, whose bands must be the
            same, or published weights.
        fresh: what stays new all the same, see `load_checkpoint`: "stage1.embed.conv" for other
            bands, "classifier" or "head" for other classes.
        freeze: whether what `pretrained` gave stays as it is, norms with their statistics and
            without stochastic depth, so that only what is new is trained: a probe of the weights.
            Gates of gyroscope attention, which pretraining does not know, are new.
        class_weights: weights of the classes in the cross-entropy; equal if None.
        scores: "mean", or "weighted" for precision, recall and F1 weighted by the labels of each
            class besides, as the protocol of MTLCC has them.
    """

    kind: str
    target: str
    recipe: dict[str, Any]
    class_weights: Tensor | None

    def __init__(
        self,
        bands: Sequence[str],
        mean: Sequence[float] | Tensor,
        deviation: Sequence[float] | Tensor,
        scale: Sequence[float] | Tensor,
        offset: Sequence[float] | Tensor,
        classes: Sequence[str],
        per_frame: bool = False,
        model: str = "timo_base",
        model_options: dict[str, Any] | None = None,
        pretrained: str | None = None,
        fresh: list[str] | None = None,
        freeze: bool = False,
        class_weights: list[float] | None = None,
        scores: str = "mean",
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float | None = None,
        schedule: str | None = None,
    ):
        given = {
            "learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup,
            "schedule": schedule,
        }  # fmt: skip
        super().__init__(
            bands, mean, deviation, scale, offset, model, model_options, betas=betas,
            **self.recipe | {name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        if scores not in ("mean", "weighted"):
            raise ValueError(f'scores is {scores!r}; it must be "mean" or "weighted"')
        self.scores = scores
        self.classes, self.per_frame = tuple(classes), per_frame
        if len({*self.classes}) < len(self.classes):
            raise ValueError(f"classes is {self.classes}; every name must be another")
        if class_weights is not None and len(class_weights) != len(self.classes):
            raise ValueError(
                f"class_weights has {len(class_weights)} values; it must have one for each of the "
                f"{len(self.classes)} classes {self.classes}"
            )
        self.model = create_model(
            model, task=self.kind, in_chans=len(self.bands), num_classes=len(self.classes),
            per_frame=per_frame, **self.model_options,
        )  # fmt: skip
        self.pretrained_report, self._kept = None, set[str]()
        if fresh and not pretrained:
            raise ValueError(
                f"fresh is {fresh} without pretrained weights, so that everything is new; leave it "
                "out, or state pretrained"
            )
        if freeze and not pretrained:
            raise ValueError(
                "freeze is true without pretrained weights, so that there is nothing to keep; "
                "leave it out, or state pretrained"
            )
        if pretrained:
            if not any(map(_holds_stem, fresh or ())):
                _same_bands(Path(pretrained), self.bands)
            self.pretrained_report = load_checkpoint(self.model, pretrained, fresh or ())
            if freeze:
                self._freeze(pretrained, {*self.pretrained_report.mapped.values()})
        weights = None
        if class_weights is not None:
            weights = torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)
        # Two sums: MeanMetric leaves NaN out, or its weights. A loss that diverged is to be seen.
        self.val_loss = SumMetric(nan_strategy="disable")
        self.val_weight = SumMetric(nan_strategy="disable")
        self.val_metrics = self.metrics().clone("val/")
        self.test_metrics = self.metrics().clone("test/")
        # Of the last test: labels in rows, predictions in columns.
        self.confusion = MulticlassConfusionMatrix(
            len(self.classes), ignore_index=IGNORE_INDEX, validate_args=False
        )

    def _freeze(self, pretrained: str, kept: set[str]) -> None:
        """Keep the weights of these names; ValueError where no other is left."""
        new = [p for name, p in self.model.named_parameters() if name not in kept]
        if not new:
            raise ValueError(
                f"freeze is true, and {pretrained} holds every weight, so that nothing is left to "
                'train; name what is to be new in fresh, as "classifier" or "head"'
            )
        self._kept = kept
        self.model.requires_grad_(False)
        for parameter in new:
            parameter.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As of any module, but what `freeze` keeps stays in evaluation mode."""
        super().train(mode)
        for prefix, module in self.model.named_modules() if self._kept else ():
            held = (*module._parameters, *module._buffers)
            if isinstance(module, DropPath) or any(f"{prefix}.{n}" in self._kept for n in held):
                module.training = False
        return self

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """What validation and test measure, over labels other than 255; `scores` says which.

        A class that occurs in neither labels nor predictions has no score: NaN, which counts in
        no mean.
        """

    @abstractmethod
    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Frames as further samples. Raises ValueError where `per_frame` and labels disagree."""

    @abstractmethod
    def labels_of(self, batch: dict) -> Tensor:
        """The labels of a batch, 255 where there is none or nothing valid to judge by."""

    def check_labels(self, batch: dict) -> None:
        """Raise DataError where a batch, on the host, has no such labels, or one of no class."""
        if self.target not in batch:
            raise DataError(
                f"series {', '.join(sorted(set(batch['name'])))}: has no {self.target}, which a "
                f"{self.kind} run needs; add mask rasters or labels=, for classification "
                "labels.csv, or leave the series out"
            )
        labels = batch[self.target]
        kinds = "the series", "every date"
        if (of_dates := labels.ndim in (2, 4)) != self.per_frame:  # (B, T) or (B, T, H, W)
            raise DataError(
                f"series {', '.join(sorted(set(batch['name'])))}: has a {self.target} for "
                f"{kinds[of_dates]}, but the model gives one for {kinds[self.per_frame]} "
                f"(per_frame={self.per_frame}); label all series alike, as in training"
            )
        unknown = ((labels < 0) | (labels >= len(self.classes))) & (labels != IGNORE_INDEX)
        if unknown.any():
            first = unknown.nonzero()[0]
            label, where = int(labels[tuple(first)]), f"series {batch['name'][first[0]]}"
            if of_dates:
                where += f", {np.datetime64(batch['dates'][first[0], first[1]].item(), 'D')}"
            raise DataError(
                f"{where}: has the label {label}, but the classes are 0 ... "
                f"{len(self.classes) - 1}, {', '.join(self.classes)}; name one for each label in "
                "task.classes, or renumber the labels (255 is ignored)"
            )

    def forward(self, batch: dict) -> Tensor:
        """Logits (B, [T,] classes[, H, W]) of raw pixels: with T per frame."""
        frames = physical(batch["image"], *self.input_units())
        return self.model(frames, batch["dates"], batch["valid"])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of what is labelled, a scalar; 0 where nothing is.

        Args:
            logits: as from `forward`, any floating dtype; the loss is float32.
            labels: as from `labels_of`, int64, 255 where there is none.
        """
        total, weight = self._total_loss(logits, labels)
        return total / weight.clamp_min(torch.finfo(weight.dtype).tiny)

    def _total_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of what is labelled, and of its weights."""
        logits, labels = self.flat(logits, labels)
        labelled = labels != IGNORE_INDEX
        total = F.cross_entropy(
            logits.float(), labels, self.class_weights, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        weight = labelled.float()
        if self.class_weights is not None:
            weight = weight * self.class_weights[labels.where(labelled, 0)]
        return total, weight.sum()

    def description(self) -> dict:
        described = {
            "kind": self.kind, "classes": self.classes, "per_frame": self.per_frame,
            "scores": self.scores,
        }  # fmt: skip
        return super().description() | described

    def training_step(self, batch: dict, index: int) -> Tensor:
        loss = self.loss(self(batch), self.labels_of(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        logits, labels = self(batch), self.labels_of(batch)
        total, weight = self._total_loss(logits, labels)
        self.val_loss.update(total)
        self.val_weight.update(weight)
        self.val_metrics.update(*self.flat(logits, labels))

    def on_validation_epoch_end(self) -> None:
        """Logs the loss of all labels at once, NaN without any, and the metrics."""
        self.log("val/loss", self.val_loss.compute() / self.val_weight.compute(), prog_bar=True)
        self.val_loss.reset()
        self.val_weight.reset()
        self._log(self.val_metrics)

    def on_test_epoch_start(self) -> None:
        self.confusion.reset()

    def test_step(self, batch: dict, index: int) -> None:
        logits, labels = self.flat(self(batch), self.labels_of(batch))
        self.test_metrics.update(logits, labels)
        self.confusion.update(logits, labels)

    def on_test_epoch_end(self) -> None:
        if not self.confusion.compute().any():
            raise DataError(
                f"data: there is nothing to measure, for every {self.target} is 255, or lies where "
                "no pixel is valid; use series with labels, or another ignore_label=, and see "
                "`timo data check`"
            )
        self._log(self.test_metrics)

    def _log(self, metrics: MetricCollection) -> None:
        for name, value in metrics.compute().items():
            if value.ndim == 0:
                self.log(name, value)
                continue
            for label, one in zip(self.classes, value):
                self.log(f"{name}/{label}", one)
        metrics.reset()


def weighted_scores(options: dict[str, Any]) -> dict[str, Metric]:
    """Precision, recall and F1 weighted by the labels of each class; `options` of torchmetrics."""
    return {
        "weighted_precision": MulticlassPrecision(average="weighted", **options),
        "weighted_recall": MulticlassRecall(average="weighted", **options),
        "weighted_f1": MulticlassF1Score(average="weighted", **options),
    }


def _holds_stem(part: str) -> bool:
    """Whether a part of the model, by its name in the model or the encoder, reads the bands."""
    return any(f"{name}.".startswith(f"{part}.") for name in (_STEM, f"encoder.{_STEM}"))


def _same_bands(pretrained: Path, bands: tuple[str, ...]) -> None:
    """DataError where the run of a checkpoint read other bands, as far as names are known."""
    folders = pretrained.resolve().parents[:2]  # checkpoints lie one deeper than the weights
    described = next((folder / TASK for folder in folders if (folder / TASK).is_file()), None)
    if described is None:
        return
    held = tuple(read_description(described)["bands"])
    known = [pair for pair in zip(held, bands) if not any(map(_UNNAMED.fullmatch, pair))]
    if len(held) != len(bands) or any(a != b for a, b in known):
        raise DataError(
            f"task.pretrained: {pretrained} reads the bands {held}, the data has {bands}; select= "
            f"the same bands in the same order, or let task.fresh hold {_STEM}, which reads them. "
            f"To keep even that, copy the file to a folder without {TASK}"
        )
