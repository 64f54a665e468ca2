"""Many locations of one shape: windows and dates are drawn before any pixel is read."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timo.data.contract import DataError, SeriesDataset, select_bands
from timo.data.transforms import sample_uniforms
from timo.data.windows import pair

MOST_MAPS = 512  # memory-mapped files a process holds at a time; each keeps one file descriptor


class LocationSeries(SeriesDataset):
    """Base of datasets whose every location holds (T, C, H, W) pixels of one type.

    A pixel that is 0 in every band holds no data. Samples are drawn by (seed, epoch, index)
    alone, whatever the worker or the batch; `set_epoch` draws anew and reaches workers that live
    on. `batch` makes many samples at once: pixels are copied once, from the file's memory map to
    their place in the batch.

    Args:
        shape: (T, C, H, W) of every location; dtype: uint8 or uint16.
        held: names of the C bands in file order; `select` picks some of them.
        tile: window to cut, int or (rows, cols), at a random place; None for the whole.
        dates: use this many random dates, in ascending order; None for all.
        seed: of the draws.
        units, scale, offset: as in SeriesDataset; one number or one for each held band.
    """

    whole = True  # `batch` makes whole batches

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: np.dtype,
        held: Sequence[str],
        select: Sequence[str] | None,
        tile: int | tuple[int, int] | None,
        dates: int | None,
        seed: int,
        units: str,
        scale: float | Sequence[float],
        offset: float | Sequence[float],
    ):
        self._channels = None if select is None else select_bands(held, select)
        if self._channels is not None:
            scale, offset = (
                value if isinstance(value, (int, float)) else [value[i] for i in self._channels]
                for value in (scale, offset)
            )
        super().__init__(select or held, units, scale, offset)
        t, _, h, w = shape
        self.shape, self.dtype, self.seed = tuple(shape), np.dtype(dtype), seed
        self.tile = (h, w) if tile is None else pair("tile", tile)
        if self.tile[0] > h or self.tile[1] > w:
            raise ValueError(f"tile: must lie in the {h} x {w} pixels of a location, got {tile}")
        if dates is not None and not 1 <= dates <= t:
            raise ValueError(f"dates: must be 1 ... {t}, the dates of a location, got {dates}")
        self.num_dates = t if dates is None else dates
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw windows and dates anew."""
        self._epoch.fill_(epoch)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W) of every sample."""
        return self.num_dates, len(self.bands), *self.tile

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)} samples")
        batch = self.batch([index % len(self)])
        sample = {key: value[0] for key, value in batch.items()}
        return sample | {"valid": sample["valid"].contiguous()}

    def __getitems__(self, indices: Sequence[int]) -> dict:
        return self.batch(indices)

    def batch(self, indices: Sequence[int], out: Tensor | None = None) -> dict:
        """The samples `indices` as `collate_series` would batch them.

        `out` (B, T, C, H, W) takes the pixels. `valid` is an expanded single value where every
        pixel is valid: do not write into it.
        """
        rows, cols, frames = self._draw(indices)
        h, w = self.tile
        if out is None:
            out = torch.empty((len(indices), *self.sample_shape), dtype=_TORCH[self.dtype.name])
        target = out.numpy()
        for b, (index, row, col) in enumerate(zip(indices, rows, cols)):
            pixels = self.pixels(index)
            for k, frame in enumerate(frames[b]):
                window = pixels[frame, :, row : row + h, col : col + w]
                target[b, k] = window if self._channels is None else window[self._channels]
        names, days, complete = self.described(indices)
        days = np.take_along_axis(days, np.asarray(frames), 1).astype(np.int64)
        valid = None
        if complete is None or not complete.all():
            valid = np.ones((len(indices), self.num_dates, h, w), bool)
            for b, (index, row, col) in enumerate(zip(indices, rows, cols)):
                for k, frame in enumerate(frames[b]):
                    if complete is None or not complete[b, frame]:
                        window = self.pixels(index)[frame, :, row : row + h, col : col + w]
                        valid[b, k] = np.bitwise_or.reduce(window, axis=0) != 0
        everywhere = torch.ones((), dtype=torch.bool).expand(len(indices), self.num_dates, h, w)
        batch = {
            "image": out,
            "dates": torch.from_numpy(days),
            "valid": everywhere if valid is None else torch.from_numpy(valid),
            "name": names,
        }
        if self.tile != self.shape[2:]:
            batch["window"] = list(zip(rows, cols))
        return batch

    def _draw(self, indices: Sequence[int]) -> tuple[list[int], list[int], list[list[int]]]:
        """Rows and columns of the windows (B,), and dates (B, T) in ascending order."""
        (t, _, h, w), (rows, cols) = self.shape, self.tile
        draws = sample_uniforms(self.seed, int(self._epoch), indices, 2 + t)
        corner = (draws[:, :2] * (h - rows + 1, w - cols + 1)).astype(np.int64)
        frames = np.sort(np.argsort(draws[:, 2:], axis=1, kind="stable")[:, : self.num_dates])
        return corner[:, 0].tolist(), corner[:, 1].tolist(), frames.tolist()

    @abstractmethod
    def location(self, index: int) -> "Location":
        """Whole location `index`."""

    def pixels(self, index: int) -> np.ndarray:
        """`location(index).pixels`."""
        return self.location(index).pixels

    def described(self, indices: Sequence[int]) -> tuple[list[str], np.ndarray, np.ndarray | None]:
        """All but the pixels of locations: names, days (B, T) and complete (B, T) or None."""
        found = [self.location(index) for index in indices]
        known = [one.complete for one in found if one.complete is not None]
        complete = np.stack(known) if len(known) == len(found) else None
        return [one.name for one in found], np.stack([one.days for one in found]), complete


class Location(NamedTuple):
    """One location, its frames in ascending order of date.

    `pixels` (T, C, H, W), memory-mapped where possible; `days` since 1970-01-01, integers (T,);
    `complete` bool (T,), true where every pixel of a date has data, None if that is not known.
    """

    name: str
    pixels: np.ndarray
    days: np.ndarray
    complete: np.ndarray | None


class RecentMaps(OrderedDict):
    """What was opened for the `MOST_MAPS` keys used last; other processes open it anew."""

    def get_or_open(self, key: int, open_map: Callable[[int], Any]) -> Any:
        if key not in self:
            found = open_map(key)
            while len(self) >= MOST_MAPS:
                self.popitem(last=False)
            self[key] = found
        self.move_to_end(key)
        return self[key]

    def __reduce__(self):
        return RecentMaps, ()


_TORCH = {"uint8": torch.uint8, "uint16": torch.uint16}


def location_dtype(dtype: np.dtype | str, where: object) -> np.dtype:
    """`dtype` if locations may hold it, else DataError naming `where`."""
    if np.dtype(dtype).name not in _TORCH:
        raise DataError(f"{where}: holds {dtype}; locations hold uint8 or uint16, convert them")
    return np.dtype(dtype)
