"""Random changes of samples and batches, the same for image, validity and mask.

A transform is a function `(sample, generator) -> sample`; the sample is one of the contract or a
batch of `collate_series`, on any device. Decisions are drawn on the CPU from the explicit
generator, for each sample of a batch anew, so the result does not depend on the device. A batch
may also come with one generator for each sample: what happens to a sample then
depends on its own generator alone, in whatever batch it is.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from timo.data.collate import by_date
from timo.data.contract import SeriesDataset

if TYPE_CHECKING:
    from timo.data.locations import LocationSeries

Generators = Generator | Sequence[Generator]
Transform = Callable[[dict, Generator], dict]

_SPATIAL = ("image", "valid", "mask")


def random_flip(sample: dict, generator: Generators) -> dict:
    """Flip left-right with probability 1/2, and up-down with probability 1/2."""
    sample = _where(_coins(sample, generator), sample, lambda x: x.flip(-1))
    return _where(_coins(sample, generator), sample, lambda x: x.flip(-2))


def random_rotate90(sample: dict, generator: Generators) -> dict:
    """Rotate by 0, 90, 180 or 270 degrees, alike likely; by 0 or 180 where H and W differ."""
    h, w = sample["image"].shape[-2:]
    if h == w:
        sample = _where(_coins(sample, generator), sample, lambda x: x.rot90(1, (-2, -1)))
    return _where(_coins(sample, generator), sample, lambda x: x.rot90(2, (-2, -1)))


class TemporalSubset:
    """Keep `count` random frames of a sample in ascending order; all where it has no more.

    One at least has a valid pixel, where the sample has any.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        self.count = count

    def __call__(self, sample: dict, generator: Generator) -> dict:
        t = len(sample["dates"])
        if t <= self.count:
            return sample
        order = torch.randperm(t, generator=generator)
        usable = order[sample["valid"].flatten(1).any(1)[order]]
        kept = order[: self.count]
        if len(usable) and usable[0] not in kept:
            kept[-1] = usable[0]
        kept = kept.sort().values
        keys = [key for key in sample if by_date(key, sample[key])]
        return sample | {key: sample[key][kept] for key in keys}


class TransformedSeries(Dataset):
    """`dataset` with transforms, each sample's draws fixed by (seed, epoch, index) alone.

    So every epoch draws anew, and the draws do not depend on the number of workers or processes.
    A sample also bears `key`, int64 (), from which a device may draw on: masking does. `set_epoch`
    reaches workers that live on (`persistent_workers=True`): the epoch lies in shared memory.
    Attributes (`bands`, `scale`, `statistics`, ...) are those of `dataset`.
    """

    def __init__(self, dataset: SeriesDataset, transforms: Sequence[Transform], seed: int = 0):
        self.dataset, self.transforms, self.seed = dataset, tuple(transforms), seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        generator = sample_generator(self.seed, int(self._epoch), index)
        sample = self.dataset[index]
        for transform in self.transforms:
            sample = transform(sample, generator)
        return sample | {"key": torch.tensor(generator.initial_seed())}

    def __getitems__(self, indices: Sequence[int]) -> list[dict] | dict:
        return self.batch(indices) if self.whole else [self[index] for index in indices]

    @property
    def nodata(self) -> float | None:
        """As in `WindowedSeries`; None where a dataset of another kind does not say."""
        value = getattr(self.dataset, "nodata", None)
        return None if value is None else float(value)

    @property
    def whole(self) -> bool:
        """Whether `batch` makes whole batches: of a `LocationSeries`, without transforms."""
        return not self.transforms and getattr(self.dataset, "whole", False)

    def batch(self, indices: Sequence[int], out: Tensor | None = None) -> dict:
        """Samples of a `LocationSeries` in one batch; see there. ValueError with transforms."""
        if not self.whole:
            raise ValueError(
                "dataset: whole batches come from a LocationSeries (StoreSeries, PublishedCorpus) "
                "without transforms; draw samples one by one: dataset[index]"
            )
        keys = sample_keys(self.seed, int(self._epoch), indices)
        return cast("LocationSeries", self.dataset).batch(indices, out) | {"key": keys}

    def __getattr__(self, name: str):
        if name == "dataset" or name.startswith("__"):  # while unpickling there is no dataset yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


def sample_keys(seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
    """int64 (len(indices),); each depends on (seed, epoch, its index) and on nothing else."""
    return torch.from_numpy((_mixed(seed, epoch, indices) % 2**63).astype(np.int64))


def sample_generator(seed: int, epoch: int, index: int) -> Generator:
    """CPU generator whose state depends on (seed, epoch, index) and on nothing else."""
    return Generator().manual_seed(int(sample_keys(seed, epoch, [index])))


def sample_uniforms(seed: int, epoch: int, indices: Sequence[int], count: int) -> np.ndarray:
    """float64 (len(indices), count) uniform in [0, 1); row i depends on (seed, epoch, indices[i]).

    For whole batches at once, where a generator for each sample would cost more than its pixels.
    """
    keys = _finalised(_mixed(seed, epoch, indices)[:, None] + np.arange(count, dtype=np.uint64))
    return (keys >> np.uint64(11)) * 2.0**-53


def _mixed(seed: int, epoch: int, indices: Sequence[int]) -> np.ndarray:
    key = np.zeros(len(indices), np.uint64)
    for part in (seed % 2**64, epoch % 2**64, np.asarray(indices, np.int64).astype(np.uint64)):
        key = _finalised(key + np.asarray(part, np.uint64))
    return key


def _finalised(key: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: neighbouring numbers (uint64) give unrelated ones."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _coins(sample: dict, generator: Generators) -> Tensor:
    """Fair bool of shape (), or (B,) for a batch."""
    if not isinstance(generator, Generator):
        return torch.stack([torch.rand((), generator=one) for one in generator]) < 0.5
    image = sample["image"]
    return torch.rand(image.shape[: image.ndim - 4], generator=generator) < 0.5


def _where(chosen: Tensor, sample: dict, change: Callable[[Tensor], Tensor]) -> dict:
    """`sample` with its spatial tensors changed where `chosen`."""
    if not chosen.any():
        return sample
    out = dict(sample)
    for key in _SPATIAL:
        x = sample.get(key)
        # Validity of whole dates (B, T) knows no place.
        if x is not None and x.ndim >= sample["image"].ndim - 2:
            # torch cannot flip uint16; its bits move alike as int16.
            x = x.view(torch.int16) if x.dtype == torch.uint16 else x
            flags = chosen.to(x.device).reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim))
            out[key] = torch.where(flags, change(x), x).view(sample[key].dtype)
    return out
