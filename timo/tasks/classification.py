"""Classification of series, or of every frame of a series."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from timo.data import IGNORE_INDEX
from timo.tasks.supervised import SupervisedTask


class ClassificationTask(SupervisedTask):
    """Fine-tune for classification (paper: downstream tasks; specification: model.md §4, §5).

    Samples have `label` () int64, or (T,) with `per_frame`; series, or dates, without a valid pixel
    are neither trained on nor measured. The defaults follow the published recipe for a batch of 4:
    5e-3 · 4 / 256, 5 of 30 epochs of warm-up, half a cosine.

    Args:
        bands, mean, deviation, scale, offset, model, model_options: see SeriesTask.
        learning_rate, weight_decay, betas, warmup, schedule: see SeriesTask.
        classes: names of the classes, in the order of their labels; 255 is ignored.
        per_frame: a label for every date, not one for the series.
        pretrained: checkpoint to start from: a run's model.safetensors, or published weights.
        class_weights: weights of the classes in the cross-entropy; equal if None.
    """

    kind, target = "classification", "label"

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
        class_weights: list[float] | None = None,
        learning_rate: float = 7.8e-5,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 1 / 6,
        schedule: str = "cosine",
    ):
        super().__init__(
            bands, mean, deviation, scale, offset, classes, per_frame, model, model_options,
            pretrained, class_weights, learning_rate, weight_decay, betas, warmup, schedule,
        )  # fmt: skip

    def metrics(self) -> MetricCollection:
        """F1 by class (NaN of one that does not occur), their mean, and accuracy."""
        options = {
            "num_classes": len(self.classes), "ignore_index": IGNORE_INDEX, "validate_args": False,
        }  # fmt: skip
        return MetricCollection(
            {
                "f1": MulticlassF1Score(average=None, zero_division=math.nan, **options),
                "mean_f1": MulticlassF1Score(average="macro", **options),
                "accuracy": MulticlassAccuracy(average="micro", **options),
            }
        )

    def labels_of(self, batch: dict) -> Tensor:
        """The labels of a batch, 255 at dates, or for series, without a valid pixel."""
        labels, valid = batch["label"], batch["valid"]
        if valid is None:
            return labels
        usable = valid if valid.ndim == 2 else valid.flatten(2).any(2)
        return labels.where(usable if labels.ndim == 2 else usable.any(1), IGNORE_INDEX)

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, classes) with (B, T) -> (B·T, ...); others as they are."""
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"label has shape {tuple(labels.shape)}, but per_frame={self.per_frame} gives "
                f"logits {tuple(logits.shape)}; labels of series need per_frame=False, labels of "
                "dates per_frame=True"
            )
        return logits.flatten(0, -2), labels.flatten()
