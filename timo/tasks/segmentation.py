"""Semantic segmentation of series, or of every frame of a series."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from timo import create_model, load_checkpoint
from timo.data import IGNORE_INDEX, physical
from timo.tasks.base import SeriesTask


class SegmentationTask(SeriesTask):
    """Fine-tune for semantic segmentation (paper: downstream tasks; specification: model.md §4).

    Args:
        bands, mean, deviation, scale, offset, model, model_options: see SeriesTask.
        learning_rate, weight_decay, betas, warmup, schedule: see SeriesTask.
        classes: names of the classes, in the order of their labels; 255 is ignored.
        per_frame: a mask for every date, not one for the series.
        pretrained: checkpoint to start from: a run's model.safetensors, or published weights.
        class_weights: weights of the classes in the cross-entropy; equal if None.
    """

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
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.0,
        schedule: str = "constant",
    ):
        super().__init__(
            bands, mean, deviation, scale, offset, model, model_options,
            learning_rate, weight_decay, betas, warmup, schedule,
        )  # fmt: skip
        self.classes, self.per_frame = tuple(classes), per_frame
        if class_weights is not None and len(class_weights) != len(self.classes):
            raise ValueError(
                f"class_weights has {len(class_weights)} values; it must have one for each of the "
                f"{len(self.classes)} classes {self.classes}"
            )
        self.model = create_model(
            model, task="segmentation", in_chans=len(self.bands), num_classes=len(self.classes),
            per_frame=per_frame, **self.model_options,
        )  # fmt: skip
        if pretrained:
            self.pretrained_report = load_checkpoint(self.model, pretrained)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights)
        self.val_metrics = segmentation_metrics(self.classes).clone("val/")
        self.test_metrics = segmentation_metrics(self.classes).clone("test/")

    def forward(self, batch: dict) -> Tensor:
        """Logits (B, classes, H, W), or (B, T, classes, H, W) per frame, of raw pixels."""
        frames = physical(batch["image"], *self.input_units())
        return self.model(frames, batch["dates"], batch["valid"])

    def loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy over labelled pixels, 0 where there is none."""
        logits, mask = _flat(logits, mask)
        labelled = mask != IGNORE_INDEX
        total = F.cross_entropy(
            logits.float(), mask, self.class_weights, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        weight = labelled.float()
        if self.class_weights is not None:
            weight = weight * self.class_weights[mask.where(labelled, 0)]
        return total / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def description(self) -> dict:
        return super().description() | {"classes": self.classes, "per_frame": self.per_frame}

    def training_step(self, batch: dict, index: int) -> Tensor:
        loss = self.loss(self(batch), batch["mask"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        logits = self(batch)
        size = len(batch["image"])
        loss = self.loss(logits, batch["mask"])
        self.log("val/loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        self.val_metrics.update(*_flat(logits, batch["mask"]))

    def on_validation_epoch_end(self) -> None:
        self._log(self.val_metrics)

    def test_step(self, batch: dict, index: int) -> None:
        self.test_metrics.update(*_flat(self(batch), batch["mask"]))

    def on_test_epoch_end(self) -> None:
        self._log(self.test_metrics)

    def _log(self, metrics: MetricCollection) -> None:
        for name, value in metrics.compute().items():
            if value.ndim == 0:
                self.log(name, value)
                continue
            for label, one in zip(self.classes, value):
                self.log(f"{name}/{label}", one)
        metrics.reset()


def segmentation_metrics(classes: Sequence[str]) -> MetricCollection:
    """IoU and F1 by class, their means over the classes that occur, and overall accuracy."""
    options = {"num_classes": len(classes), "ignore_index": IGNORE_INDEX, "validate_args": False}
    return MetricCollection(
        {
            "iou": MulticlassJaccardIndex(average=None, **options),
            "f1": MulticlassF1Score(average=None, **options),
            "mean_iou": MulticlassJaccardIndex(average="macro", **options),
            "mean_f1": MulticlassF1Score(average="macro", **options),
            "accuracy": MulticlassAccuracy(average="micro", **options),
        }
    )


def _flat(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Frames as further samples: (B, T, classes, H, W) with (B, T, H, W) -> (B·T, ...)."""
    if logits.ndim == 5:
        if mask.ndim == 3:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, one map for the series; a model with "
                "per_frame=True needs one for every date"
            )
        return logits.flatten(0, 1), mask.flatten(0, 1)
    if mask.ndim == 4:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, a map for every date; use per_frame=True"
        )
    return logits, mask
