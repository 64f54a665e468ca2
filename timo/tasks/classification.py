"""Classification of series, or of every frame of a series."""

import math
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from timo.data import IGNORE_INDEX
from timo.tasks.supervised import SupervisedTask, weighted_scores


class ClassificationTask(SupervisedTask):
    """Fine-tune for classification (paper: downstream tasks; specification: model.md §4, §5).

    Samples have `label` () int64, or (T,) with `per_frame`; series, or dates, without a valid pixel
    are neither trained on nor measured. `recipe` is the published one for a batch of 4:
    5e-3 · 4 / 256, 5 of 30 epochs of warm-up, half a cosine.

    Args: see SupervisedTask.
    """

    kind, target = "classification", "label"
    recipe = {"learning_rate": 7.8e-5, "weight_decay": 0.05, "warmup": 1 / 6, "schedule": "cosine"}

    def metrics(self) -> MetricCollection:
        """F1 by class (NaN of one that does not occur), their mean, and accuracy."""
        options: dict[str, Any] = {
            "num_classes": len(self.classes), "ignore_index": IGNORE_INDEX, "validate_args": False,
        }  # fmt: skip
        chosen: dict[str, Metric | MetricCollection] = {
            "f1": MulticlassF1Score(average=None, zero_division=math.nan, **options),
            "mean_f1": MulticlassF1Score(average="macro", **options),
            "accuracy": MulticlassAccuracy(average="micro", **options),
        }
        if self.scores == "weighted":
            chosen |= weighted_scores(options)
        return MetricCollection(chosen)

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
