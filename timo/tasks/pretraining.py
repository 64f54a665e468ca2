"""Masked autoencoder pretraining."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from timo import create_model
from timo.models.mae import MAEOutput, MaskedAutoencoder
from timo.models.masking import STRATEGIES, draw_units, unit_grid, usable_units, visible_count
from timo.tasks.base import SeriesTask


class PretrainingTask(SeriesTask):
    """Pretrain on unlabelled series by reconstructing masked units (paper: pretraining).

    Defaults follow the published recipe, the stem's batch statistics ("all") included, but for the
    target: each unit is normalised by itself ("patch"), which does not depend on what else is in
    the batch. `model_options` may say otherwise.

    Args:
        bands, mean, deviation, scale, offset, model, model_options: see SeriesTask.
        learning_rate, weight_decay, betas, warmup, schedule: see SeriesTask.
        mask_ratio: share of 32 x 32 units to hide.
        masking: which units: "random" (published), whole dates ("date"), places at all dates
            ("location"), rectangles ("block"), or one of these for each sample ("mixture"); see
            `timo.models.masking.draw_units`.
        compile: mode of `torch.compile` for training steps, "default", or "reduce-overhead" for
            CUDA graphs; None runs them as they are written. Where clouds change the number of
            visible units, the second number is compiled anew, for all others too; so is 1.
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
        masking: str = "random",
        compile: Literal["default", "reduce-overhead"] | None = None,
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
            **{"pixel_norm": "patch", "stem_statistics": "all"} | self.model_options,
        )  # fmt: skip
        visible_count(2, mask_ratio)  # raises where it is out of range
        if masking not in STRATEGIES:
            raise ValueError(f"masking is {masking!r}; it must be one of {', '.join(STRATEGIES)}")
        self.mask_ratio, self.masking = mask_ratio, masking
        self._train = reconstruct
        if compile:
            self._train = torch.compile(reconstruct, fullgraph=True, mode=compile)

    def forward(self, batch: dict) -> MAEOutput:
        """Reconstruct a batch of raw pixels; normalisation happens where units are gathered.

        Args:
            batch: image, dates and valid as models take them; key (B,), see `draw_units`; units,
                the least number of usable units of a sample. `SeriesData` supplies them.
        """
        return self._run(reconstruct, batch)

    def _run(self, run: Callable[..., MAEOutput], batch: dict) -> MAEOutput:
        keep = visible_count(batch["units"], self.mask_ratio)
        tensors = (batch[name] for name in ("image", "key", "dates", "valid"))
        return run(self.model, *tensors, *self.input_units(), keep, self.masking)

    def training_step(self, batch: dict, index: int) -> Tensor:
        loss = self._run(self._train, batch).loss
        # A copy, for a CUDA graph writes the next loss into the same memory.
        shown = loss.detach().clone()
        self.log("train/loss", shown, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        loss = self(batch).loss
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["image"]), sync_dist=True)


def reconstruct(
    model: MaskedAutoencoder,
    frames: Tensor,
    key: Tensor,
    dates: Tensor | None,
    valid: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    keep: int,
    masking: str,
) -> MAEOutput:
    """Draw the visible units and reconstruct the others: what a training step compiles.

    Args:
        model: the autoencoder.
        frames, dates, valid, scale, offset: see `MaskedAutoencoder.forward`.
        key, keep, masking: see `timo.models.masking.draw_units`.
    """
    ids = draw_units(key, unit_grid(frames), keep, masking, usable_units(frames, valid))
    return model(frames, visible_ids=ids, dates=dates, valid=valid, scale=scale, offset=offset)
