"""Datasets as a LightningDataModule: batches, augmentation, normalisation."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from timo.data import (
    IGNORE_INDEX,
    DataError,
    LocationLoader,
    SeriesDataset,
    TemporalSubset,
    TransformedSeries,
    collate_series,
    random_flip,
    random_rotate90,
)
from timo.data.augmentation import BandDropout, RandomClouds, RandomResizedCrop
from timo.data.locations import LocationSeries
from timo.data.readers.common import PublishedSeries
from timo.data.series import WindowedSeries
from timo.data.transforms import Generators, Transform, sample_generator
from timo.models.inputs import UNIT
from timo.models.masking import least_usable, usable_units


class Normalisation(TypedDict):
    """What tasks need to read pixels, (C,) each; see `SeriesTask`."""

    mean: Tensor
    deviation: Tensor
    scale: Tensor
    offset: Tensor


class SeriesData(LightningDataModule):
    """Training, validation and test sets of series.

    Args:
        train: the series to learn from, as `timo.data.RasterSeries`.
        val: series to watch while training; none if None.
        test: series that `timo evaluate` measures on, each pixel once where windows overlap.
        batch_size: samples in a batch.
        dates: use this many random dates of each training sample, in order; all if None.
        augment: random flips and quarter turns of training samples, the same for the mask.
        crop: cut a random square of a quarter to all of a training sample, resized to so many
            pixels; none if None.
        band_dropout: probability that a training sample lacks a band.
        clouds: probability of a simulated cloud on a date of a training sample.
        workers: processes that load samples.
        seed: of shuffling and augmentation; a sample's draws depend on (seed, epoch, index)
            alone, so neither on the number of workers nor on their timing.
    """

    def __init__(
        self,
        train: SeriesDataset | None = None,
        val: SeriesDataset | None = None,
        test: SeriesDataset | None = None,
        batch_size: int = 8,
        dates: int | None = None,
        augment: bool = True,
        crop: int | None = None,
        band_dropout: float = 0.0,
        clouds: float = 0.0,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        # Samples of `val` bear the same keys, and so the same masks, at every validation.
        self.val = None if val is None else TransformedSeries(val, [], seed)
        self.test = test
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        transforms: list[Transform] = [TemporalSubset(dates)] if dates else []
        if clouds and train is not None:
            transforms.append(RandomClouds(clouds, cloud_brightness(train)))
        transforms += [RandomResizedCrop(crop)] if crop else []
        transforms += [BandDropout(band_dropout)] if band_dropout else []
        flips: list[Callable[[dict, Generators], dict]]
        flips = [random_flip, random_rotate90] if augment else []
        if isinstance(train, LocationSeries) and dates:
            raise ValueError("dates: state --data.train.dates, so that only those are read")
        # Locations of a corpus come in whole batches, which are turned on the device.
        self._batched = flips if isinstance(train, LocationSeries) and not transforms else []
        transforms += [] if self._batched else flips
        self._dates = dates
        self.train = None if train is None else TransformedSeries(train, transforms, seed)
        for name, other in (("val", val), ("test", test)):
            if train is not None and other is not None:
                _same_bands(train, name, other)
        _disjoint({"train": train, "val": val, "test": test})

    def splits(self) -> dict[str, dict]:
        """What each part holds; for published data sets the split with its hash."""
        record = {}
        for part, held in (("train", self.train), ("val", self.val), ("test", self.test)):
            if held is not None:
                dataset = held.dataset if isinstance(held, TransformedSeries) else held
                record[part] = {
                    "dataset": type(dataset).__name__,
                    "samples": len(dataset),
                    "split": getattr(dataset, "split", None),
                    "split_hash": getattr(dataset, "split_hash", None),
                }
        return record

    @property
    def training(self) -> TransformedSeries:
        """`train` with its augmentation; ValueError where there is none."""
        if self.train is None:
            raise ValueError("train is None; pass the series to learn from: SeriesData(train=...)")
        return self.train

    def normalisation(self) -> Normalisation:
        """Mean and deviation of `train`, and its raw units: what tasks need to read pixels."""
        dataset = self.training.dataset
        mean, deviation = dataset.statistics()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        return Normalisation(
            mean=mean, deviation=deviation, scale=dataset.scale, offset=dataset.offset
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw shuffling and augmentation anew; tasks call it when an epoch starts."""
        self.training.set_epoch(epoch)
        self._sampler.set_epoch(epoch)

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        valid = compact_valid(batch["valid"])
        task = getattr(self.trainer, "lightning_module", None)
        check = getattr(task, "check_labels", None)
        if check:  # a supervised task, which may see nothing in a sample
            check(batch)
            return batch | {"valid": valid}
        usable = batch["valid"].flatten(1).any(1).tolist()
        if not all(usable):
            names = sorted({name for name, good in zip(batch["name"], usable) if not good})
            raise DataError(
                f"series {', '.join(names)}: a sample has no valid pixel at any date; leave such "
                "windows out with min_valid="
            )
        batch = batch | {"valid": valid}
        if self._batched:  # draws are made on the host, which must not wait for the device
            batch["seeds"] = batch["key"].tolist()
        # Counted here, for on the device it would have to be waited for.
        image = batch["image"]
        if valid is not None and any(side % UNIT for side in image.shape[3:]):
            # Units begin at the upper left: where they do not fill a frame, turning it moves
            # pixels from one to another.
            valid = self._turned(batch | {"image": image[:, :1, :1]})["valid"]
        batch["units"] = least_usable(image, usable_units(image, valid))
        return batch

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return self._turned(batch)

    def _turned(self, batch: dict) -> dict:
        """The batch flipped and turned, where that is done for whole batches."""
        if self._batched and self.trainer is not None and self.trainer.training:
            generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
            for transform in self._batched:
                batch = transform(batch, generators)
        return batch

    def train_dataloader(self) -> DataLoader:
        train, lengths = self.training, None
        if hasattr(train.dataset, "lengths"):
            lengths = [min(t, self._dates or t) for t in train.lengths()]
            lengths = lengths if len(set(lengths)) > 1 else None
        self._sampler = SeededShuffle(len(train), self.seed, lengths, self.batch_size)
        # A last batch of another size would disturb batch statistics; keep it if it is the only.
        full = len(train) >= self.batch_size
        return self._loader(train, sampler=self._sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.val is None else self._loader(self.val)

    def test_dataloader(self) -> DataLoader:
        if self.test is None:
            raise ValueError("test is None; pass the series to measure on: SeriesData(test=...)")
        test = EachPixelOnce(self.test) if isinstance(self.test, WindowedSeries) else self.test
        return self._loader(test)

    def _loader(self, dataset: Dataset, **options) -> DataLoader:
        pin = torch.cuda.is_available()
        if isinstance(dataset, LocationSeries | TransformedSeries) and dataset.whole:
            return LocationLoader(
                dataset, self.batch_size, workers=self.workers, pin=pin,
                persistent_workers=self.workers > 0, **options,
            )  # fmt: skip
        return DataLoader(
            dataset,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=collate_series,
            persistent_workers=self.workers > 0,
            pin_memory=pin,
            **options,
        )


class EachPixelOnce(Dataset):
    """Windows of `dataset`, labelled where no earlier window of the series lies; 255 elsewhere.

    Windows overlap where one is shifted inward at an edge, or where their stride is less than the
    tile; scores would count those pixels several times.
    """

    def __init__(self, dataset: WindowedSeries):
        self.dataset, self._boxes = dataset, dataset.boxes()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        if "mask" not in sample:
            return sample
        number, _, _, h, w = self._boxes[index]
        earlier = self._boxes[:index]
        down, right = (earlier[:, 1:3] - self._boxes[index, 1:3]).T
        near = (earlier[:, 0] == number) & (abs(down) < h) & (abs(right) < w)
        mask = sample["mask"].clone()
        for row, col in zip(down[near], right[near]):
            mask[..., max(0, row) : row + h, max(0, col) : col + w] = IGNORE_INDEX
        return sample | {"mask": mask}


class SeededShuffle(Sampler):
    """A permutation that (seed, epoch) determines.

    With `lengths`, the number of dates of each sample, runs of `batch` samples are of similar
    length, so that batches need little padding: within each pool of 32 batches the samples are
    sorted by length, and the runs are shuffled.
    """

    def __init__(self, size: int, seed: int, lengths: Sequence[int] | None = None, batch: int = 1):
        self.size, self.seed, self.epoch = size, seed, 0
        self.lengths, self.batch = lengths, batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        generator = sample_generator(self.seed, self.epoch, -1)
        order = torch.randperm(self.size, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        pool = 32 * self.batch
        runs = []
        for start in range(0, self.size, pool):
            alike = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            runs += [alike[i : i + self.batch] for i in range(0, len(alike), self.batch)]
        # A run that is not full stays last, or every batch after it would straddle two runs.
        full = [run for run in runs if len(run) == self.batch]
        rest = [run for run in runs if len(run) < self.batch]
        shuffled = torch.randperm(len(full), generator=generator).tolist()
        return iter([i for run in [*(full[k] for k in shuffled), *rest] for i in run])


def cloud_brightness(dataset: SeriesDataset) -> Tensor:
    """Raw value of a cloud in each band, float32 (C,): reflectance 0.7, or 230 of 8 bits."""
    if dataset.units == "reflectance":
        return (0.7 - dataset.offset) / dataset.scale
    if dataset[0]["image"].dtype == torch.uint8:
        return torch.full((len(dataset.bands),), 230.0)
    raise ValueError(
        f"clouds: how bright one is, is known for reflectance and 8 bits only, the units are "
        f"{dataset.units}; state units=reflectance and scale=, or leave clouds out"
    )


def compact_valid(valid: Tensor) -> Tensor | None:
    """The cheapest equal form of validity (B, T, H, W): None, (B, T), or itself.

    Models take a faster path where nothing, or only whole dates, are invalid. Runs on the batch
    before it goes to the device, where looking at values would wait for it.
    """
    frames = valid.flatten(2)
    if bool(frames.all()):
        return None
    whole = frames.all(2)
    return whole if bool((whole | ~frames.any(2)).all()) else valid


def _same_bands(train: SeriesDataset, name: str, other: SeriesDataset) -> None:
    if tuple(train.bands) != tuple(other.bands):
        raise DataError(
            f"{name}: has bands {tuple(other.bands)} but train has {tuple(train.bands)}; select= "
            "the same bands in the same order"
        )
    for what in ("scale", "offset"):
        if not torch.equal(getattr(train, what), getattr(other, what)):
            raise DataError(
                f"{name}: has {what} {getattr(other, what).tolist()} but train has "
                f"{getattr(train, what).tolist()}; both must be in the same raw units"
            )


def _disjoint(parts: dict[str, SeriesDataset | None]) -> None:
    """No sample of a published data set may be in two parts."""
    seen: dict[tuple, str] = {}
    for part, dataset in parts.items():
        if not isinstance(dataset, PublishedSeries):
            continue
        for name in dataset.names:
            first = seen.setdefault((type(dataset), name), part)
            if first != part:
                raise DataError(
                    f"{part}: holds sample {name!r} of {dataset.root}, which {first} holds too; a "
                    'score would be of pixels learned from: use another split=, as split="test"'
                )
