"""Windows over rasters: where they lie, how predictions on them join, how the result is written."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timo.data.contract import DataError, atomic_output


def grid_windows(
    height: int, width: int, tile: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int]]:
    """Upper left (row, col) of the windows that cover (height, width), row by row.

    The last window of a row or column is shifted inward to end at the border, so no window
    leaves the raster, unless the raster is smaller than the tile.
    """
    rows, cols = (
        sorted({min(start, max(0, size - t)) for start in range(0, max(1, size - t + s), s)})
        for size, t, s in zip((height, width), tile, stride)
    )
    return [(row, col) for row in rows for col in cols]


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """`value` as (rows, columns), both at least 1."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(v, int) or v < 1 for v in both):
        raise ValueError(f"{name}: must be a positive int or two of them (rows, cols), got {value}")
    return both


def pixel_box(region: Sequence[float] | None, height: int, width: int) -> tuple[int, int, int, int]:
    """(row0, col0, row1, col1) in pixels of `region`, end exclusive; the whole raster for None.

    Four ints are pixels; with a float among them all four are fractions of height and width.
    """
    if region is None:
        return 0, 0, height, width
    box: Any = tuple(region)
    if len(box) == 4 and any(isinstance(v, float) for v in box) and all(0 <= v <= 1 for v in box):
        box = tuple(math.floor(v * size + 0.5) for v, size in zip(box, (height, width) * 2))
    if not (
        len(box) == 4
        and all(isinstance(v, int) for v in box)
        and 0 <= box[0] < box[2] <= height
        and 0 <= box[1] < box[3] <= width
    ):
        raise ValueError(
            f"region: must be (row0, col0, row1, col1) within {height} x {width} pixels, or "
            f"fractions in 0 ... 1, not empty, got {tuple(region)}"
        )
    return box


def blend(
    predictions: Iterable[tuple[int, int, Tensor]], height: int, width: int, overlap: int
) -> Iterator[tuple[int, Tensor]]:
    """Join overlapping window predictions to strips of full width, top to bottom.

    Where windows overlap, each counts by a weight that falls linearly over `overlap` pixels
    towards its border, where a model sees the least context. Holds one row of windows only, so
    a raster of any height needs the memory of one strip.

    Args:
        predictions: (row, col, values) with values (..., h, w) floating point, such as logits,
            in the order of `grid_windows`.
        height, width: of the raster.
        overlap: pixels that neighbouring windows share, 0 for none.

    Yields:
        (row, strip) with strip (..., n, width), the weighted mean; the strips tile the height.
    """
    top, total, weights = 0, torch.empty(0), torch.empty(0)
    for row, col, values in predictions:
        if total.numel() == 0:
            strip = (*values.shape[:-1], width)
            total, weights = values.new_zeros(strip), values.new_zeros(strip[-2:])
        if row < top:
            raise ValueError(f"predictions: row {row} comes after row {top}; see grid_windows")
        if row > top:
            yield top, _mean(total, weights, row - top)
            # The rows that later windows still add to move up; clone, as the regions overlap.
            for buffer in (total, weights):
                kept = buffer[..., row - top :, :].clone()
                buffer.zero_()
                buffer[..., : kept.shape[-2], :] = kept
            top = row
        h, w = min(values.shape[-2], height - row), min(values.shape[-1], width - col)
        ramp = _ramp(values.shape[-2], overlap)[:, None] * _ramp(values.shape[-1], overlap)
        ramp = ramp.to(values)[:h, :w]
        total[..., :h, col : col + w] += values[..., :h, :w] * ramp
        weights[:h, col : col + w] += ramp
    if total.numel():
        yield top, _mean(total, weights, height - top)


class GeoTiffWriter:
    """Write a GeoTIFF piece by piece; it appears at `path` complete, or not at all.

    Use as a context: the pixels go to a temporary name in the same folder, which takes the place
    of `path` when the block ends well and all of them can be read. After an exception an older
    file at `path` is as before.

    Args:
        path: file to write; its folder must exist.
        shape: (bands, height, width).
        dtype: NumPy dtype of the pixels.
        crs, transform: georeference, as RasterSeries states it; None for none.
        nodata: value of pixels without data.
        descriptions: band names, such as dates or classes, one for each band.
        colours: red, green and blue (0 ... 255) of the values 0, 1, ... of a single band of uint8;
            TIFF has none for several bands.

    Raises:
        DataError: at the end of the block, where the file was not written whole (a full disk).
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int, int],
        dtype: str,
        crs=None,
        transform=None,
        nodata: float | None = None,
        descriptions: Sequence[str] | None = None,
        colours: Sequence[tuple[int, int, int]] | None = None,
    ):
        if descriptions is not None and len(descriptions) != shape[0]:
            raise ValueError(
                f"descriptions: must name {shape[0]} bands, got {len(descriptions)} names"
            )
        if colours is not None and (shape[0] != 1 or dtype != "uint8" or len(colours) > 256):
            raise ValueError(
                f"colours: must be at most 256 of a single band of uint8, got {len(colours)} of "
                f"{shape[0]} bands of {dtype}"
            )
        self.path, self.shape, self.descriptions = Path(path), shape, descriptions
        self.colours = colours
        self.profile = {
            "driver": "GTiff", "count": shape[0], "height": shape[1], "width": shape[2],
            "dtype": dtype, "crs": crs, "transform": transform, "nodata": nodata,
            "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate",
            "predictor": 3 if np.issubdtype(np.dtype(dtype), np.floating) else 2,
            "bigtiff": "if_safer",
        }  # fmt: skip
        if shape[0] > 1:  # GDAL takes three or four bands of bytes for a picture
            self.profile |= {"photometric": "minisblack", "alpha": "no"}

    def __enter__(self) -> "GeoTiffWriter":
        rasterio = import_rasterio()
        with ExitStack() as stack:
            partial = stack.enter_context(atomic_output(self.path))
            stack.enter_context(_read_back(partial, self.path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                self._file = stack.enter_context(rasterio.open(partial, "w", **self.profile))
            if self.colours is not None:
                self._file.write_colormap(1, dict(enumerate(self.colours)))
            for number, text in enumerate(self.descriptions or (), 1):
                self._file.set_band_description(number, text)
            self._stack = stack.pop_all()
        return self

    def write(self, pixels: np.ndarray | Tensor, row: int, col: int = 0) -> None:
        """Write `pixels` (bands, h, w), or (h, w) of a single band, with upper left (row, col)."""
        from rasterio.windows import Window

        pixels = pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        bands, h, w = pixels.shape
        if bands != self.shape[0] or row + h > self.shape[1] or col + w > self.shape[2]:
            raise ValueError(
                f"pixels: {pixels.shape} at row {row}, column {col} does not lie in {self.shape} "
                f"of {self.path}"
            )
        pixels = pixels.astype(self.profile["dtype"], copy=False)
        self._file.write(pixels, window=Window(col, row, w, h))

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


def import_rasterio():
    """The rasterio module; ImportError naming the extra that brings it where it is absent."""
    try:
        import rasterio
    except ImportError as error:
        raise ImportError(
            "reading and writing rasters needs rasterio: pip install timo[geo]"
        ) from error
    return rasterio


@contextmanager
def open_raster(path: str | Path, **options) -> Iterator:
    """The open raster; what GDAL cannot open or read becomes a DataError naming the file.

    `options` go to `rasterio.open`, as driver="GTiff" to refuse whatever else bears the name.
    """
    rasterio = import_rasterio()
    try:
        # Env turns GDAL's messages on stderr into log records.
        with rasterio.Env(), warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, **options) as file:
                yield file
    except (rasterio.errors.RasterioError, UnicodeDecodeError) as error:  # names of projections
        raise DataError(
            f"{path}: cannot be read as a raster ({error.__cause__ or error}); the file is "
            "missing, cut short or of another format: fetch or write it again"
        ) from error


@contextmanager
def _read_back(partial: Path, path: Path) -> Iterator[None]:
    """Read `partial` after the block, which has closed it; DataError naming `path` if it is cut.

    GDAL writes blocks and the directory on closing, where a full disk raises no exception.
    """
    yield
    try:
        with open_raster(partial) as file:
            for _, window in file.block_windows(1):
                file.read(window=window)
    except DataError as error:
        raise DataError(
            f"{path}: could not be written whole ({error.__cause__}); is the disk full? Make room "
            "and write it again"
        ) from error


def _mean(total: Tensor, weights: Tensor, rows: int) -> Tensor:
    if rows > len(weights) or not bool((weights[:rows] > 0).all()):
        raise ValueError("predictions: the windows leave pixels uncovered; see grid_windows")
    return total[..., :rows, :] / weights[:rows]


def _ramp(size: int, overlap: int) -> Tensor:
    """(size,) weights: 1 inside, falling to 1 / (overlap + 1) at both ends, never 0."""
    edge = torch.arange(size) + 1
    return torch.minimum(edge, edge.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
