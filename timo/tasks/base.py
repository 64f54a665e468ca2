"""What all tasks share: bands and their normalisation, optimiser, schedule."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from timo.data import DataError, SeriesDataset, physical
from timo.data.contract import evenly_spaced
from timo.data.transforms import sample_generator
from timo.tasks.data import SeriesData

FAR = 20  # deviations; snow is some 6 from a green landscape


def read_description(path: Path) -> dict:
    """What `SeriesTask.description` said, from task.json; DataError where that is damaged."""
    try:
        described = json.loads(path.read_text())
        if not {"bands", "model"} <= described.keys():
            raise ValueError("bands or model are missing")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error}); copy it again from its run") from error
    return described


class SeriesTask(LightningModule):
    """A model, the bands that it reads and how raw pixels become its input.

    Args:
        bands: names of the C bands, in channel order.
        mean, deviation: (C,) each; the model sees (physical - mean) / deviation.
        scale, offset: (C,) each, of the data set at hand: physical = raw * scale + offset.
        model: timo_tiny, timo_base, timo_large or timo_huge.
        model_options: further options of `timo.create_model`.
        learning_rate: peak, of AdamW. The published recipes scale theirs by batch / 256.
        weight_decay: of AdamW; biases, norms and tokens are not decayed.
        betas: of AdamW.
        warmup: share of all steps over which the rate rises from 0.
        schedule: "cosine" falls to 0 over the remaining steps, "constant" stays.
    """

    model: nn.Module
    mean: Tensor
    deviation: Tensor
    scale: Tensor
    offset: Tensor
    units: str | None = None  # of the physical values that it was trained on; None if unknown
    nodata: float | None = None  # of the data that it was trained on

    def __init__(
        self,
        bands: Sequence[str],
        mean: Sequence[float] | Tensor,
        deviation: Sequence[float] | Tensor,
        scale: Sequence[float] | Tensor,
        offset: Sequence[float] | Tensor,
        model: str,
        model_options: dict[str, Any] | None,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        warmup: float,
        schedule: str,
    ):
        super().__init__()
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {schedule!r}; it must be cosine or constant")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is {warmup}; it must be a share in 0 ... 1")
        self.bands = tuple(bands)
        self.model_name, self.model_options = model, dict(model_options or {})
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.schedule = warmup, schedule
        given = {"mean": mean, "deviation": deviation, "scale": scale, "offset": offset}
        for name, value in given.items():
            numbers = torch.as_tensor(value, dtype=torch.float32).clone()
            if numbers.shape != (len(self.bands),) or (
                name == "deviation" and (numbers <= 0).any()
            ):
                raise ValueError(
                    f"{name} is {value}; it must be a number for each of the bands {self.bands}"
                    f"{', above 0' if name == 'deviation' else ''}"
                )
            self.register_buffer(name, numbers)

    def input_units(self) -> tuple[Tensor, Tensor]:
        """(scale, offset), (C,) each: raw * scale + offset is what the model sees."""
        return self.scale / self.deviation, (self.offset - self.mean) / self.deviation

    def read_from(self, dataset: SeriesDataset) -> None:
        """Take scale and offset from `dataset`; DataError unless bands and units are as trained."""
        if tuple(dataset.bands) != self.bands:
            raise DataError(
                f"data has bands {tuple(dataset.bands)}; this model reads {self.bands}: select= "
                "the same bands in the same order; bands= names those of files that do not"
            )
        if self.units is not None and dataset.units != self.units:
            raise DataError(
                f"data has values in {dataset.units}; this model was trained on {self.units}: "
                "state units=, and scale= and offset=, as in training"
            )
        self.scale.copy_(dataset.scale)
        self.offset.copy_(dataset.offset)

    def warn_of_range(self, dataset: SeriesDataset, samples: int = 4) -> None:
        """Warn where values are not of the size of those of training.

        A band's mean lies much further from that of training than scenes do, or every band varies
        much less than scenes do: reflectance for digital numbers. Judged by `samples` samples,
        evenly spaced; where none has a valid pixel nothing is said.
        """
        count, total = 0, torch.zeros(2, len(self.bands), dtype=torch.float64)
        for index in evenly_spaced(len(dataset), samples):
            sample = dataset[index]
            pixels = physical(sample["image"], dataset.scale, dataset.offset).movedim(1, -1)
            pixels = pixels[sample["valid"]]  # [pixels, C]
            if not len(pixels):
                continue
            pixels = pixels.double()
            count += len(pixels)
            total += torch.stack([pixels.sum(0), (pixels**2).sum(0)])
            found = pixels.mean(0).float()
            far = (found - self.mean.cpu()).abs() > FAR * self.deviation.cpu()
            if far.any():
                band = int(far.nonzero()[0])
                warnings.warn(
                    f"series {sample['name']}: band {self.bands[band]} has values of "
                    f"{found[band]:.4g} on average, those that the model was trained on "
                    f"{self.mean[band]:.4g} ± {self.deviation[band]:.4g}; results may mean "
                    "nothing. Are scale=, offset= and nodata= those of training (config.yaml)?",
                    stacklevel=2,
                )
                return
        mean, square = total / max(1, count)
        spread, trained = (square - mean**2).clamp(min=0).sqrt().float(), self.deviation.cpu()
        if count and (spread * FAR < trained).all():
            warnings.warn(
                f"data: values of band {self.bands[0]} vary by {spread[0]:.4g} (standard "
                f"deviation), those that the model was trained on by {trained[0]:.4g}, and other "
                "bands alike; results may mean nothing. Are units=, scale= and offset= those of "
                "training (config.yaml)?",
                stacklevel=2,
            )

    def warn_of_nodata(self, dataset: SeriesDataset) -> None:
        """Warn where training had a value without data and `dataset`, which may have one, has none.

        Readers of published layouts know what is valid, and have no such attribute.
        """
        if self.nodata is not None and getattr(dataset, "nodata", self.nodata) is None:
            warnings.warn(
                f"data: has no nodata value, stated or in its files; in training it was "
                f"{self.nodata:g}. Pixels that have it count as valid here: pass --data.nodata "
                f"{self.nodata:g} (nodata=) if they hold no data",
                stacklevel=2,
            )

    @property
    def _data(self) -> SeriesData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            raise ValueError(
                "trainer.sync_batchnorm is true, which puts norms without validity in place of "
                "the model's; leave it false and set task.model_options.sync_batchnorm to true"
            )
        self.units, self.nodata = self._data.training.units, self._data.training.nodata

    def description(self) -> dict:
        """Arguments that build the task again, but for scale and offset, its units and nodata.

        JSON can hold it.
        """
        return {
            "bands": self.bands,
            "units": self.units,
            "nodata": self.nodata,
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "model": self.model_name,
            "model_options": self.model_options,
        }

    def on_train_start(self) -> None:
        # A checkpoint holds the rate after its last step by the schedule of the run that left it.
        scheduler = cast(LambdaLR, self.lr_schedulers())
        for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
            group["lr"] = peak * scheduler.lr_lambdas[0](scheduler.last_epoch)

    def on_train_epoch_start(self) -> None:
        self._data.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: dict, index: int) -> None:
        # Stochastic depth depends on (seed, step, rank) alone, so that a run that was stopped and
        # resumed equals one that was not.
        seed = self._data.seed
        drawn = sample_generator(seed, self.global_step, -2 - self.global_rank).initial_seed()
        torch.manual_seed(drawn)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim > 1 and not name.endswith("mask_token")
                (decayed if matrix else kept).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(groups, self.learning_rate, self.betas, fused=fused)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) and (self.warmup or self.schedule != "constant"):
            raise ValueError(
                f"schedule is {self.schedule} with warmup {self.warmup}, but neither max_epochs "
                "nor max_steps says how long the run is; set one of them, or schedule constant "
                "and warmup 0"
            )
        scheduler = LambdaLR(optimizer, lambda step: self._factor(step, steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _factor(self, step: int, steps: float) -> float:
        """Share of the peak learning rate at a step."""
        rising = self.warmup * steps if self.warmup else 0.0  # steps may be infinite
        if step < rising:
            return (step + 1) / (rising + 1)
        if self.schedule == "constant":
            return 1.0
        done = (step - rising) / (steps - rising) if steps > rising else 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
