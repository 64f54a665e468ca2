"""The sample contract that every dataset of the library keeps, and what follows from it alone.

A dataset is a `torch.utils.data.Dataset` whose samples are dicts:

=========  ==========================  =====================================================
`image`    (T, C, H, W)                float32, or the raw uint8 or uint16 of the file
`dates`    (T,) int64                  days since 1970-01-01, ascending
`valid`    (T, H, W) bool              True where the pixel is usable
`mask`     (H, W) or (T, H, W) int64   labels 0 ... 254, 255 = ignore; only where labels exist
`label`    () or (T,) int64            class of the series, or of each date, 255 = ignore
`name`     str                         the series that the sample was cut from
`window`   (row, col)                  upper left pixel, where the sample was cut from a raster
=========  ==========================  =====================================================

The dataset states what the numbers are: `bands` (names, in channel order), `units` (of physical
values), `scale` and `offset` (float32, (C,)): physical = raw * scale + offset.
These integers stay raw so that a batch travels small; models apply scale and offset on the device.
"""

import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORE_INDEX = 255

_IMAGE_DTYPES = (torch.float32, torch.uint8, torch.uint16)


class DataError(ValueError):
    """A file or a sample is not what it must be; the message names it and the remedy."""


class SeriesDataset(Dataset, ABC):
    """Base of the datasets: states bands and units, computes statistics.

    Args:
        bands: names of the C channels, in their order, without repetition.
        units: of physical values, such as "reflectance", "DN", "dB", "linear".
        scale, offset: one number or C numbers; physical = raw * scale + offset.
    """

    def __init__(
        self,
        bands: Sequence[str],
        units: str = "DN",
        scale: float | Sequence[float] = 1.0,
        offset: float | Sequence[float] = 0.0,
    ):
        self.bands = tuple(bands)
        if len(set(self.bands)) != len(self.bands):
            raise DataError(f"bands: names must differ from one another, got {self.bands}")
        self.units = units
        self.scale = per_band("scale", scale, self.bands)
        self.offset = per_band("offset", offset, self.bands)
        if (self.scale == 0).any():
            raise ValueError(f"scale: must not be 0, got {self.scale.tolist()}")

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    def statistics(self, max_samples: int = 256) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per band over valid physical pixels, float32 (C,) each.

        Reads at most `max_samples` samples, evenly spaced over the dataset, and accumulates in
        float64. Raises DataError where no pixel is valid.
        """
        count, mean = 0, torch.zeros(len(self.bands), dtype=torch.float64)
        squares = torch.zeros_like(mean)
        indices = evenly_spaced(len(self), max_samples)
        for index in with_progress(indices, "statistics"):
            sample = self[index]
            image = physical(sample["image"], self.scale, self.offset).double()
            pixels = image.movedim(1, 0)[:, sample["valid"]]  # (C, valid pixels)
            n = pixels.shape[1]
            if n == 0:
                continue
            # Chan's merge: no difference of large sums, so a small spread on a large mean survives.
            here = pixels.mean(1)
            shift = here - mean
            squares = (
                squares
                + ((pixels - here[:, None]) ** 2).sum(1)
                + shift**2 * (count * n / (count + n))
            )
            mean = mean + shift * (n / (count + n))
            count += n
        if count == 0:
            raise DataError(
                f"statistics: none of the {len(indices)} samples read has a valid pixel; see "
                "`timo data check` for what each date holds"
            )
        return mean.float(), (squares / count).sqrt().float()


def per_band(name: str, value: float | Sequence[float], bands: Sequence[str]) -> Tensor:
    """`value` as a finite float32 tensor (C,)."""
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if tensor.ndim == 0:
        tensor = tensor.repeat(len(bands))
    if tensor.shape != (len(bands),) or not tensor.isfinite().all():
        raise ValueError(
            f"{name}: must be one finite number, or one for each of the {len(bands)} bands "
            f"{tuple(bands)}, got {value}"
        )
    return tensor


def select_bands(held: Sequence[str], select: Sequence[str] | None) -> list[int]:
    """Positions in `held` of the names in `select`, in the order of `select`; all for None."""
    if select is None:
        return list(range(len(held)))
    if isinstance(select, str) or not select:
        raise ValueError(f"select: must be a sequence of band names, got {select!r}")
    missing = [band for band in select if band not in held]
    if missing:
        raise DataError(
            f"select: no band named {', '.join(missing)}; the files hold {', '.join(held)} "
            "(state other names, in file order, with bands=)"
        )
    return [list(held).index(band) for band in select]


def physical(image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """float32 physical values of `image` (..., C, H, W); `scale` and `offset` are (C,)."""
    scale = scale.to(image.device)[:, None, None]
    return image.float() * scale + offset.to(image.device)[:, None, None]


def evenly_spaced(total: int, most: int) -> list[int]:
    """At most `most` ascending positions in `range(total)`, the first and the last among them."""
    if most < 1:
        raise ValueError(f"max_samples: must be at least 1, got {most}")
    if total <= most:
        return list(range(total))
    step = (total - 1) / max(1, most - 1)
    return [math.floor(i * step + 0.5) for i in range(most)]


def validate_sample(sample: dict, bands: Sequence[str] | None = None) -> None:
    """Raise DataError unless `sample` keeps the contract above; the message names the key.

    `bands` are the dataset's, where the number of channels is to be checked too.
    """
    name = sample.get("name")
    if not isinstance(name, str):
        raise DataError(f"sample['name'] must be a str, got {type(name).__name__}")

    def need(holds: bool, key: str, must: str, got: object) -> None:
        if not holds:
            raise DataError(f"sample {name!r}: {key} must be {must}, got {got}")

    for key in ("image", "dates", "valid"):
        got = type(sample.get(key)).__name__
        need(isinstance(sample.get(key), Tensor), key, "a tensor", got)
    image, dates, valid = sample["image"], sample["dates"], sample["valid"]
    need(image.ndim == 4 and image.numel() > 0, "image", "(T, C, H, W), none 0", tuple(image.shape))
    need(image.dtype in _IMAGE_DTYPES, "image", "float32, uint8 or uint16", image.dtype)
    t, c, h, w = image.shape
    need(bands is None or c == len(bands), "image", f"of {len(bands or ())} channels {bands}", c)
    finite = not image.is_floating_point() or bool(image.isfinite().all())
    need(finite, "image", "finite (0 at invalid pixels)", "NaN or infinity")
    need(dates.dtype == torch.int64, "dates", "int64", dates.dtype)
    need(dates.shape == (t,), "dates", f"({t},), one for each frame", tuple(dates.shape))
    need(bool((dates.diff() >= 0).all()), "dates", "ascending", dates.tolist())
    need(valid.dtype == torch.bool, "valid", "bool", valid.dtype)
    need(valid.shape == (t, h, w), "valid", f"({t}, {h}, {w})", tuple(valid.shape))
    if "label" in sample:
        label = sample["label"]
        need(
            isinstance(label, Tensor) and label.dtype == torch.int64,
            "label",
            "an int64 tensor",
            getattr(label, "dtype", type(label).__name__),
        )
        need(label.shape in ((), (t,)), "label", f"() or ({t},)", tuple(label.shape))
        need(
            bool(((label >= 0) & (label <= IGNORE_INDEX)).all()),
            "label",
            f"in 0 ... {IGNORE_INDEX}",
            label.tolist(),
        )
    if "mask" in sample:
        mask = sample["mask"]
        need(
            isinstance(mask, Tensor) and mask.dtype == torch.int64,
            "mask",
            "an int64 tensor",
            getattr(mask, "dtype", type(mask).__name__),
        )
        need(
            mask.shape in ((h, w), (t, h, w)),
            "mask",
            f"({h}, {w}) or ({t}, {h}, {w})",
            tuple(mask.shape),
        )
        need(
            0 <= int(mask.min()) and int(mask.max()) <= IGNORE_INDEX,
            "mask",
            f"in 0 ... {IGNORE_INDEX}",
            f"{int(mask.min())} ... {int(mask.max())}",
        )


@contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[Path]:
    """Name to write to in place of `path`; it becomes `path` only if the block ends well.

    After an exception the temporary file is gone and whatever `path` held is as before.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise DataError(f"{path}: its folder does not exist; create {path.parent} first")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Folder to fill in place of `folder`; it becomes `folder` only if the block ends well.

    What a killed process left is removed by the next one. Raises DataError where `folder` is there
    and not an empty folder, or its parent does not exist.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; remove it or name another")
    if not folder.parent.is_dir():
        raise DataError(f"{folder}: its parent does not exist; create {folder.parent} first")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def with_progress(items: Any, what: str, patience: float = 2.0) -> Iterator:
    """Yield `items`, of known length; after `patience` seconds a bar appears on stderr.

    There is none where rich is not installed.
    """
    start, rest = time.monotonic(), iter(items)
    for done, item in enumerate(rest):
        if time.monotonic() - start <= patience:
            yield item
            continue
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            yield from chain([item], rest)
        else:
            yield from track(
                chain([item], rest), what, len(items), done, console=Console(stderr=True),
                transient=True,
            )  # fmt: skip
        return
