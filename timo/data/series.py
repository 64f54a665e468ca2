"""Series on disk as a dataset of windows: what raster and NumPy series have in common."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timo.data.contract import IGNORE_INDEX, DataError, SeriesDataset, physical
from timo.data.labels import LABELS, read_labels
from timo.data.windows import grid_windows, pair, pixel_box

# labels(image (T, C, H, W) physical float32, valid (T, H, W), bands) -> mask int64
Labels = Callable[[Tensor, Tensor, tuple[str, ...]], Tensor]


@dataclass(frozen=True)
class Series:
    """One series on disk: `dates` int64 (T,) ascending, pixels (height, width), georeference."""

    name: str
    dates: np.ndarray
    height: int
    width: int
    crs: Any = None
    transform: Any = None


class WindowedSeries(SeriesDataset):
    """Dataset of windows cut from series; subclasses read pixels in `_read`.

    Args:
        root: folder whose labels.csv, if there, labels series or dates (see
            `timo.data.labels.read_labels`), every window of a series alike; None for no folder.
        series: the series, in their order.
        tile: window size in pixels, int or (rows, cols); None for each series whole.
        stride: distance of windows, `tile` if None. Edge windows are shifted inward; where the
            region is smaller than the tile they are padded with pixels that are not valid.
        region: (row0, col0, row1, col1) to stay within, pixels (ints) or fractions (floats):
            train on (0.0, 0.0, 1.0, 0.7) and evaluate on (0.0, 0.7, 1.0, 1.0).
        min_valid: leave out windows with a smaller share of valid pixels; above 0 every window
            is read once at construction.
        labels: derives `mask`, (H, W) or (T, H, W) int64, from the physical image, in place of
            masks on disk. For workers started by spawn it must be a module-level function.
        ignore_label: label on disk that becomes 255.
        cache: keep each series in memory after the first read (each worker its own copy).
        bands, units, scale, offset: as in SeriesDataset.

    Attributes:
        nodata: raw value that stands for no data, beside NaN; None where none does, as far as is
            known.
    """

    nodata: float | None = None

    def __init__(
        self,
        root: Path | None,
        series: Sequence[Series],
        tile: int | tuple[int, int] | None,
        stride: int | tuple[int, int] | None,
        region: Sequence[float] | None,
        min_valid: float,
        labels: Labels | None,
        ignore_label: int | None,
        cache: bool,
        **band_info,
    ):
        super().__init__(**band_info)
        if not 0 <= min_valid <= 1:
            raise ValueError(f"min_valid: must be a share in 0 ... 1, got {min_valid}")
        if stride is not None and tile is None:
            raise ValueError("stride: needs tile")
        self.series = tuple(series)
        if double := [name for name, n in Counter(s.name for s in series).items() if n > 1]:
            raise DataError(
                f"samples: several series are called {double[0]!r}, by which labels and results "
                "are told apart; rename their folders, or read them one at a time"
            )
        self.labels, self.ignore_label = labels, ignore_label
        self._listed: dict[str, Tensor] = {}
        if root is not None and (root / LABELS).is_file():
            self._listed = read_labels(root / LABELS, {s.name: s.dates.tolist() for s in series})
        self._cache: dict[int, tuple] | None = {} if cache else None
        self._cut = tile is not None or region is not None
        self._windows = []  # (series, row, col, rows, cols, rows with data, cols with data)
        for number, one in enumerate(self.series):
            row0, col0, row1, col1 = pixel_box(region, one.height, one.width)
            size = (row1 - row0, col1 - col0)
            h, w = size if tile is None else pair("tile", tile)
            step = (h, w) if stride is None else pair("stride", stride)
            held = min(h, size[0]), min(w, size[1])
            for row, col in grid_windows(*size, (h, w), step):
                self._windows.append((number, row0 + row, col0 + col, h, w, *held))
        if min_valid > 0:
            padded = any(window[3:5] != window[5:] for window in self._windows)
            shares = [self[i]["valid"].float().mean().item() for i in range(len(self))]
            self._windows = [w for w, share in zip(self._windows, shares) if share >= min_valid]
            if not self._windows:
                beyond = "; use a smaller tile, for what lies beyond a raster is not valid"
                beyond = beyond if padded else ""
                raise DataError(
                    f"min_valid: no window has {min_valid:.0%} valid pixels; the best has "
                    f"{max(shares):.1%}. Lower min_valid, or see `timo data check`{beyond}"
                )

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict:
        sample = self._sample(*self._windows[index])
        if not self._cut:
            del sample["window"]
        return sample

    def cut(self, number: int, row: int, col: int, h: int, w: int) -> dict:
        """A sample of the contract for any window of series `number`, with its `window`.

        The window is of (h, w) pixels from (row, col), both within the raster, on; what lies beyond
        the raster is 0, not valid, and 255 in the mask.
        """
        one = self.series[number]
        return self._sample(
            number, row, col, h, w, min(h, one.height - row), min(w, one.width - col)
        )

    def _sample(self, number, row, col, h, w, held_h, held_w) -> dict:
        image, valid, mask = self._pixels(number, row, col, held_h, held_w)
        if (held_h, held_w) != (h, w):
            edge = [(0, h - held_h), (0, w - held_w)]
            image = np.pad(image, [(0, 0), (0, 0), *edge])
            valid = np.pad(valid, [(0, 0), *edge])
            if mask is not None:
                mask = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + edge, constant_values=IGNORE_INDEX)
        one = self.series[number]
        sample: dict[str, Any] = {
            "image": torch.from_numpy(image),
            "dates": torch.from_numpy(one.dates.copy()),
            "valid": torch.from_numpy(valid),
            "name": one.name,
            "window": (row, col),
        }
        if self.labels is not None:
            values = physical(sample["image"], self.scale, self.offset)
            sample["mask"] = self._checked(self.labels(values, sample["valid"], self.bands), valid)
        elif mask is not None:
            sample["mask"] = torch.from_numpy(mask)
        if one.name in self._listed:
            if "mask" in sample:
                raise DataError(
                    f"series {one.name!r}: has a mask, and a label in {LABELS}; move one of them "
                    "away, for it is either mapped or classified"
                )
            sample["label"] = self._listed[one.name].clone()
        return sample

    def lengths(self) -> list[int]:
        """Number of dates of every sample."""
        return [len(self.series[window[0]].dates) for window in self._windows]

    def boxes(self) -> np.ndarray:
        """(windows, 5) int64: series, upper left row and column, rows and columns."""
        return np.array([window[:5] for window in self._windows])

    def windows_of(self, number: int) -> list[int]:
        """Indices of the windows of one series, row by row."""
        return [i for i, window in enumerate(self._windows) if window[0] == number]

    def nonfinite(self, index: int) -> np.ndarray:
        """Pixels of window `index` with NaN or infinity that no nodata value explains, (T,)."""
        number, row, col, _, _, h, w = self._windows[index]
        image, _, _ = self._read(number, row, col, h, w)
        return (~np.isfinite(tensor_pixels(image))).any(1).sum((1, 2))

    def _pixels(self, number, row, col, h, w) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Clean (image, valid, mask) of a window, writable and contiguous."""
        if self._cache is None:
            return self._clean(number, *self._read(number, row, col, h, w))
        if number not in self._cache:
            one = self.series[number]
            whole = self._read(number, 0, 0, one.height, one.width)
            self._cache[number] = self._clean(number, *whole)
        image, valid, mask = self._cache[number]
        box = np.s_[..., row : row + h, col : col + w]
        return image[box].copy(), valid[box].copy(), None if mask is None else mask[box].copy()

    def _clean(self, number, image, valid, mask):
        image = tensor_pixels(image)
        finite = np.isfinite(image)
        if not finite.all():
            valid = valid & finite.all(1)
            image = np.where(finite, image, np.zeros((), image.dtype))
        if mask is not None:
            mask = mask.astype(np.int64)
            if self.ignore_label is not None:
                mask = np.where(mask == self.ignore_label, IGNORE_INDEX, mask)
            low, high = mask.min(), mask.max()
            if low < 0 or high > IGNORE_INDEX:
                raise DataError(
                    f"series {self.series[number].name!r}: labels must be in 0 ... 254, 255 to "
                    f"ignore, got {low} ... {high}; renumber them, or state ignore_label="
                )
        return np.ascontiguousarray(image), np.ascontiguousarray(valid), mask

    def _checked(self, mask: Tensor, valid: np.ndarray) -> Tensor:
        shapes = (valid.shape[1:], valid.shape)
        if mask.dtype != torch.int64 or tuple(mask.shape) not in shapes:
            raise ValueError(
                f"labels: must return int64 of shape {shapes[0]} or {shapes[1]}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        return mask

    @abstractmethod
    def _read(
        self, number: int, row: int, col: int, h: int, w: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Image (T, C, h, w) as on disk, valid bool (T, h, w), mask (h, w) or (T, h, w) or None."""


def tensor_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that pixels of `dtype` take in a sample: uint8 and uint16 stay, others float32.

    In this machine's order of bytes. Raises ValueError where they are no numbers.
    """
    if dtype.name in ("uint8", "uint16"):
        return dtype.newbyteorder("=")
    if dtype.kind in "iuf":
        return np.dtype(np.float32)
    raise ValueError(f"pixels of type {dtype} are not supported; convert to integers or float32")


def tensor_pixels(image: np.ndarray) -> np.ndarray:
    """`image` in the dtype of a sample; infinite where it lies beyond float32."""
    with np.errstate(over="ignore"):
        return image.astype(tensor_dtype(image.dtype), copy=False)


def subfolders_of(folder: Path) -> list[Path]:
    """Folders in `folder` that are not hidden, by name."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def sample_folders(root: Path, samples: Sequence[str] | None, holds, what: str) -> list[Path]:
    """Folders under `root` that are series: `root` itself, or its subfolders sorted by name.

    `holds(folder)` says whether a folder is a series; `samples` names the subfolders to use.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; it must hold {what}, or folders of them")
    subfolders = subfolders_of(root)
    if samples is not None:
        folders = [root / name for name in samples]
    elif holds(root):
        if any(holds(folder) for folder in subfolders):
            raise DataError(
                f"{root}: holds {what} and also folders of them; move the former into a folder of "
                "their own, or name the folders to use with samples="
            )
        return [root]
    else:
        folders = subfolders
    for folder in folders:
        if not folder.is_dir() or not holds(folder):
            raise DataError(
                f"{folder}: holds no {what}; complete or remove it, or name the folders to use "
                "with samples="
            )
    if not folders:
        raise DataError(f"{root}: is empty; it must hold {what}, or folders of them")
    return folders
