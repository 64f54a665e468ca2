"""Semantic segmentation of series, or of every frame of a series."""

import math
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from timo.data import IGNORE_INDEX
from timo.tasks.supervised import SupervisedTask, weighted_scores


class SegmentationTask(SupervisedTask):
    """Fine-tune for semantic segmentation (paper: downstream tasks; specification: model.md §4).

    Samples have `mask` (H, W) int64, or (T, H, W) with `per_frame`; pixels that are valid at no
    date, or not at that date, are neither trained on nor measured.

    Args: see SupervisedTask.
    """

    kind, target = "segmentation", "mask"
    recipe = {"learning_rate": 1e-4, "weight_decay": 0.01, "warmup": 0.0, "schedule": "constant"}

    def metrics(self) -> MetricCollection:
        """IoU and F1 by class (NaN of one that does not occur), their means, overall accuracy."""
        options: dict[str, Any] = {
            "num_classes": len(self.classes), "ignore_index": IGNORE_INDEX, "validate_args": False,
        }  # fmt: skip
        chosen: dict[str, Metric | MetricCollection] = {
            "iou": MulticlassJaccardIndex(average=None, zero_division=math.nan, **options),
            "f1": MulticlassF1Score(average=None, zero_division=math.nan, **options),
            "mean_iou": MulticlassJaccardIndex(average="macro", **options),
            "mean_f1": MulticlassF1Score(average="macro", **options),
            "accuracy": MulticlassAccuracy(average="micro", **options),
        }
        if self.scores == "weighted":
            chosen |= weighted_scores(options)
        return MetricCollection(chosen)

    def labels_of(self, batch: dict) -> Tensor:
        """The masks of a batch, 255 where the date, or no date of the series, has a valid pixel."""
        mask, valid = batch["mask"], batch["valid"]
        if valid is None:
            return mask
        valid = valid if valid.ndim == 4 else valid[..., None, None]
        return mask.where(valid if mask.ndim == 4 else valid.any(1), IGNORE_INDEX)

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, classes, H, W) with (B, T, H, W) -> (B·T, ...); others as they are."""
        if logits.ndim == 5:
            if labels.ndim == 3:
                raise ValueError(
                    f"mask has shape {tuple(labels.shape)}, one map for the series; a model with "
                    "per_frame=True needs one for every date"
                )
            return logits.flatten(0, 1), labels.flatten(0, 1)
        if labels.ndim == 4:
            raise ValueError(
                f"mask has shape {tuple(labels.shape)}, a map for every date, but the model gives "
                "one for the series (per_frame=False); fine-tune on masks of dates, or use mask.tif"
            )
        return logits, labels
