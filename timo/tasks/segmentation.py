"""Semantic segmentation of series, or of every frame of a series."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)

from timo.data import IGNORE_INDEX
from timo.tasks.supervised import SupervisedTask


class SegmentationTask(SupervisedTask):
    """Fine-tune for semantic segmentation (paper: downstream tasks; specification: model.md §4).

    Samples have `mask` (H, W) int64, or (T, H, W) with `per_frame`; pixels that are valid at no
    date, or not at that date, are neither trained on nor measured.

    Args:
        bands, mean, deviation, scale, offset, model, model_options: see SeriesTask.
        learning_rate, weight_decay, betas, warmup, schedule: see SeriesTask.
        classes: names of the classes, in the order of their labels; 255 is ignored.
        per_frame: a mask for every date, not one for the series.
        pretrained: checkpoint to start from: a run's model.safetensors, or published weights.
        class_weights: weights of the classes in the cross-entropy; equal if None.
        scores: "mean", or "weighted" for precision, recall and F1 weighted by the pixels of each
            class besides, as the protocol of MTLCC has them.
    """

    kind, target = "segmentation", "mask"

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
        scores: str = "mean",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.0,
        schedule: str = "constant",
    ):
        if scores not in ("mean", "weighted"):
            raise ValueError(f'scores is {scores!r}; it must be "mean" or "weighted"')
        self.scores = scores
        super().__init__(
            bands, mean, deviation, scale, offset, classes, per_frame, model, model_options,
            pretrained, class_weights, learning_rate, weight_decay, betas, warmup, schedule,
        )  # fmt: skip

    def description(self) -> dict:
        return super().description() | {"scores": self.scores}

    def metrics(self) -> MetricCollection:
        """IoU and F1 by class (NaN of one that does not occur), their means, overall accuracy."""
        options = {
            "num_classes": len(self.classes), "ignore_index": IGNORE_INDEX, "validate_args": False,
        }  # fmt: skip
        chosen = {
            "iou": MulticlassJaccardIndex(average=None, zero_division=math.nan, **options),
            "f1": MulticlassF1Score(average=None, zero_division=math.nan, **options),
            "mean_iou": MulticlassJaccardIndex(average="macro", **options),
            "mean_f1": MulticlassF1Score(average="macro", **options),
            "accuracy": MulticlassAccuracy(average="micro", **options),
        }
        if self.scores == "weighted":
            chosen |= {
                "weighted_precision": MulticlassPrecision(average="weighted", **options),
                "weighted_recall": MulticlassRecall(average="weighted", **options),
                "weighted_f1": MulticlassF1Score(average="weighted", **options),
            }
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
                f"mask has shape {tuple(labels.shape)}, a map for every date; use per_frame=True"
            )
        return logits, labels
