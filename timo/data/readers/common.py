"""What the readers of published data sets share: named samples, splits, files, labels."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timo.data.contract import DataError, SeriesDataset
from timo.data.series import tensor_pixels
from timo.data.windows import open_raster

SPLITS = ("train", "val", "test")
INCOMPLETE = ("error", "skip")
_LARGEST = 4096  # pixels; published patches are much smaller, damaged headers say anything

log = logging.getLogger(__name__)


class PublishedSeries(SeriesDataset):
    """Base of the readers: samples with names, a split with a hash, classes.

    Args:
        root: folder of the data set.
        split: name of the part that `names` are.
        names: the samples of this split; kept in ascending order whatever their order here.
        classes: names of the classes in the order of their labels.
        bands, units, scale, offset: as in SeriesDataset.

    Subclasses read a sample in `_sample(name)`, and count its dates in `_length(name)`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        names: Iterable[str],
        classes: Sequence[str],
        **band_info,
    ):
        super().__init__(**band_info)
        self.root, self.split, self.classes = Path(root), split, tuple(classes)
        self.names = tuple(sorted(names))
        if not self.names:
            raise DataError(f"{self.root}: split {split!r} holds no sample; is the copy complete?")
        self.split_hash = split_hash(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        return self._sample(self.names[index]) | {"name": self.names[index]}

    def lengths(self) -> list[int]:
        """Number of dates of every sample, without reading it."""
        return [self._length(name) for name in self.names]

    @abstractmethod
    def _sample(self, name: str) -> dict:
        """Sample `name` as it lies on disk, cleaned."""

    @abstractmethod
    def _length(self, name: str) -> int:
        """Number of dates of sample `name`, without reading it."""


def split_hash(names: Iterable[str]) -> str:
    """sha256 of the sorted sample names, one a line: equal where two copies hold the same split."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def choose(argument: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, or ValueError naming the argument and what it may be."""
    if value not in allowed:
        raise ValueError(f"{argument}: must be one of {', '.join(allowed)}, got {value!r}")
    return value


def need_folder(root: str | Path, holds: str, source: str) -> Path:
    """`root` as a Path; DataError saying what it must hold, and where to get it, if no folder."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; it must hold {holds}. Get it from {source}")
    return root


def need_files(
    missing: Sequence[str | Path], total: int, what: str, source: str, incomplete: str = "error"
) -> None:
    """Say how many of `total` files (or samples: `what`) are missing, with examples.

    Raises DataError, or with incomplete="skip" logs a warning for the caller to go on without.
    """
    if not missing:
        return
    text = (
        f"{len(missing)} of {total} {what} are missing, as {', '.join(map(str, missing[:3]))}; the "
        f"copy is incomplete: get the rest from {source}"
    )
    if incomplete == "error":
        raise DataError(f'{text}, or leave them out with incomplete="skip"')
    log.warning("%s; left out", text)


def inside(root: Path, name: str, stated_in: Path) -> Path:
    """`root / name` for a name that a file states; DataError where it leads out of `root`."""
    path = root / name
    if not name or "\0" in name or not path.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{stated_in}: states the file {name!r}, which lies outside {root}; data sets name "
            "files within their own folder only, so get this one again from its source"
        )
    return path


def read_text(path: Path) -> str:
    """Text of a file; DataError naming it where it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); fetch it again") from None


def read_json(path: Path) -> Any:
    """Content of a JSON file; DataError naming it for anything else."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); fetch it again") from None


def read_raster(
    path: Path,
    count: int | None,
    dtype: str | Sequence[str],
    size: Sequence[int] | None = None,
    grid: tuple | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Pixels (C, H, W) as on disk, usable bool (C, H, W) by the file's nodata, and its grid.

    Raises DataError where bands (any number for None), dtype, size, or the `grid` (CRS, transform)
    that another file of the sample has returned, are others than stated.
    """
    with open_raster(path, driver="GTiff") as file:  # a VRT could name any file
        dtypes = (dtype,) if isinstance(dtype, str) else tuple(dtype)
        found, its = (file.crs, tuple(file.transform)[:6]), (file.height, file.width)
        checks: list[tuple[str, Any, bool, Any]] = [
            ("dtype", file.dtypes[0], set(file.dtypes) <= set(dtypes), " or ".join(dtypes)),
            ("size", its, max(its) <= _LARGEST, f"at most {_LARGEST} pixels wide and high"),
        ]
        if count is not None:
            checks.append(("band count", file.count, file.count == count, count))
        if size is not None:
            checks.append(("size", its, its == tuple(size), tuple(size)))
        if grid is not None:
            same = found[0] == grid[0] and np.allclose(found[1], grid[1], rtol=1e-9, atol=1e-9)
            checks.append(("grid", found, same, grid))
        for what, held, holds, must in checks:
            if not holds:
                raise DataError(
                    f"{path}: its {what} is {held}, it must be {must} as in the published files; "
                    "fetch the file again, or read your own with RasterSeries"
                )
        return file.read(), file.read_masks() > 0, found


def clean(image: np.ndarray, valid: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors (T, C, H, W) and (T, H, W): not valid, and 0, where a band is NaN or infinite.

    `valid` is (T, H, W), or (T, C, H, W), where a pixel needs all of its bands.
    """
    valid = valid if valid.ndim == 3 else np.all(valid, 1)
    image = tensor_pixels(image)
    if image.dtype.kind == "f":
        valid = valid & np.isfinite(image).all(1)
    image = np.where(valid[:, None], image, np.zeros((), image.dtype))
    return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(valid.copy())


def map_labels(labels: np.ndarray, table: Mapping[int, int], path: Path) -> torch.Tensor:
    """int64 labels through `table` (on disk -> class, 255 = ignore); DataError for any other."""
    held, inverse = np.unique(labels, return_inverse=True)
    unknown = [value for value in held.tolist() if value not in table]
    if unknown:
        raise DataError(
            f"{path}: holds the labels {unknown[:5]}, which are no classes of the data set "
            f"({min(table)} ... {max(table)}); fetch the file again"
        )
    mapped = np.array([table[value] for value in held.tolist()], np.int64)
    return torch.from_numpy(mapped[inverse].reshape(labels.shape))
