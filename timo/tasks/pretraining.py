"""Masked autoencoder pretraining."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timo import create_model
from timo.models.mae import MAEOutput
from timo.tasks.base import SeriesTask


class PretrainingTask(SeriesTask):
    """Pretrain on unlabelled series by reconstructing masked units (paper: pretraining).

    Defaults follow the published recipe but for the target: each unit is normalised by itself
    ("patch"), which does not depend on what else is in the batch.

    Args:
        bands, mean, deviation, scale, offset, model, model_options: see SeriesTask.
        learning_rate, weight_decay, betas, warmup, schedule: see SeriesTask.
        mask_ratio: share of 32 x 32 units to hide.
    """

    def __init__(
        self,
        bands: Sequence[str],
        mean: Sequence[float] | Tensor,
        deviation: Sequence[float] | Tensor,
        scale: Sequence[float] | Tensor,
        offset: Sequence[float] | Tensor,
        model: str = "timo_base",
        model_options: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        learning_rate: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.1,
        schedule: str = "cosine",
    ):
        super().__init__(
            bands, mean, deviation, scale, offset, model, model_options,
            learning_rate, weight_decay, betas, warmup, schedule,
        )  # fmt: skip
        self.model = create_model(
            model, task="mae", in_chans=len(self.bands),
            **{"pixel_norm": "patch"} | self.model_options,
        )  # fmt: skip
        self.mask_ratio = mask_ratio

    def forward(self, batch: dict, generator: torch.Generator | None = None) -> MAEOutput:
        """Reconstruct a batch of raw pixels; normalisation happens where units are gathered."""
        scale, offset = self.input_units()
        return self.model(
            batch["image"], self.mask_ratio, dates=batch["dates"], valid=batch["valid"],
            scale=scale, offset=offset, generator=generator,
        )  # fmt: skip

    def training_step(self, batch: dict, index: int) -> Tensor:
        loss = self(batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        # The same units are hidden at every validation, so that its losses compare.
        generator = torch.Generator(self.device).manual_seed(index)
        loss = self(batch, generator).loss
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["image"]), sync_dist=True)
