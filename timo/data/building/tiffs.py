"""One GeoTIFF of a scene: its header, where it lies, and its pixels."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from timo.data.building.geotags import geo_tags
from timo.data.windows import import_rasterio

_LARGEST = 16_384  # pixels of a side that is read whole; damaged headers say anything

# Looking for side files would list the folder of every raster.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_NUM_THREADS": "1"}


class Header(NamedTuple):
    height: int
    width: int
    bands: list[str]
    dtype: str
    scales: tuple[float, ...]
    offsets: tuple[float, ...]


def header_of(file) -> Header:
    """Header of an open file; bands without a description are band1, band2 ..."""
    bands = [text or f"band{i}" for i, text in enumerate(file.descriptions, 1)]
    height, width = file.shape
    return Header(height, width, bands, file.dtypes[0], file.scales, file.offsets)


@dataclass(frozen=True)
class Grid:
    """Georeference of a raster; `crs` as text, `transform` as its six numbers."""

    crs: str
    transform: tuple[float, ...]
    height: int
    width: int

    def same(self, other: "Grid") -> bool:
        """Whether both have one CRS and size, and corners within half a pixel."""
        sizes = (self.height, self.width) == (other.height, other.width)
        return sizes and self.crs == other.crs and self.covers(other)

    def covers(self, other: "Grid") -> bool:
        """Whether the corners of both lie within half a pixel of the coarser one."""
        pixel = max(np.hypot(grid.transform[0], grid.transform[3]) for grid in (self, other))
        first, last = (
            np.subtract(self.at(*a), other.at(*b))
            for a, b in (((0, 0), (0, 0)), ((self.width, self.height), (other.width, other.height)))
        )
        return max(np.abs(first).max(), np.abs(last).max()) <= 0.5 * pixel

    def at(self, col: float, row: float) -> tuple[float, float]:
        a, b, c, d, e, f = self.transform
        return a * col + b * row + c, d * col + e * row + f

    def centre(self, window: tuple[int, int] | None, size: int) -> tuple[str, float, float] | None:
        """CRS, x and y of the centre of a window; None where the raster has no CRS."""
        if not self.crs:
            return None
        row, col = window or ((self.height - size) / 2, (self.width - size) / 2)
        return self.crs, *self.at(col + size / 2, row + size / 2)


def degrees(centres: list[tuple[str, float, float] | None]) -> list[tuple[float, float]]:
    """Longitude and latitude of each, NaN for None and where the CRS has no place on Earth.

    One call for each CRS, which is what costs.
    """
    found = [(float("nan"), float("nan"))] * len(centres)
    for crs in sorted({centre[0] for centre in centres if centre}):
        from rasterio._err import CPLE_BaseError  # GDAL's errors have no public class
        from rasterio.errors import CRSError, RasterioError
        from rasterio.warp import transform

        at = {i: centre[1:] for i, centre in enumerate(centres) if centre and centre[0] == crs}
        try:
            places = transform(crs, "EPSG:4326", *zip(*at.values()))
        except (CRSError, RasterioError, CPLE_BaseError):
            continue
        for i, longitude, latitude in zip(at, *places):
            found[i] = float(longitude), float(latitude)
    return found


class Unfit(Exception):
    """A scene that cannot enter the store: (reason, detail)."""


@contextmanager
def gdal_settings() -> Iterator[None]:
    rasterio = import_rasterio()
    with rasterio.Env(**_GDAL), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def read_tiff(
    path: Path,
    bands: list[int],
    corner: tuple[int, int] | None,
    size: int,
    like: Header | None = None,
) -> tuple[np.ndarray, Grid, np.ndarray | None]:
    """Pixels (C, H, W), 0 where a band says that there is no data, and the grid of the file.

    Also where all bands have data, bool (H, W), or None where the file does not say. All of the
    file, or the window of `size` pixels at the upper left `corner`.
    """
    from rasterio.enums import MaskFlags
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    try:
        with open_tiff(path) as file:
            if file.count != len(bands):
                raise Unfit(
                    "wrong bands", f"{path}: holds {file.count} bands, {len(bands)} are needed"
                )
            if like is not None:
                _check_header(path, header_of(file), like)
            window = None if corner is None else Window(corner[1], corner[0], size, size)
            if corner and (corner[0] + size > file.height or corner[1] + size > file.width):
                raise Unfit("wrong size", f"{path}: has no {size} x {size} pixels at {corner}")
            if window is None and max(file.shape) > _LARGEST:
                its = f"{file.height} x {file.width} pixels"
                raise Unfit("wrong size", f"{path}: {its}, at most {_LARGEST} a side are read")
            pixels = file.read(bands, window=window)
            flags = {flag for band in file.mask_flag_enums for flag in band}
            held = None
            if flags == {MaskFlags.nodata} and file.nodata == 0 and len(bands) == 1:
                held = pixels[0] != 0
            elif flags != {MaskFlags.all_valid}:
                held = (file.read_masks(bands, window=window) != 0).all(0)
                pixels[:, ~held] = 0
            return pixels, Grid(*_georeference(path), *file.shape), held
    except RasterioError as error:
        missing = not path.exists()
        reason = "missing file" if missing else "unreadable"
        raise Unfit(reason, f"{path}: {error.__cause__ or error}") from None


def open_tiff(path: Path, **options: str):
    """A GeoTIFF, open, without its georeference.

    GDAL takes longer to make a CRS of its keys than to read the pixels of a scene, and
    `rasterio.open` to look for credentials.
    """
    return import_rasterio().DatasetReader(
        str(path), driver="GTiff", **({"GEOREF_SOURCES": "NONE"} | options)
    )


_KNOWN: dict[bytes, tuple[str, tuple[float, ...]]] = {}


def _georeference(path: Path) -> tuple[str, tuple[float, ...]]:
    """CRS as text and transform, decoded once for all files of the same tags."""
    tags = geo_tags(path)
    if tags is None or tags not in _KNOWN:
        with open_tiff(path, GEOREF_SOURCES="INTERNAL") as file:
            found = _crs_text(file.crs), tuple(file.transform)[:6]
        if tags is None:
            return found
        if len(_KNOWN) >= 1024:
            _KNOWN.clear()
        _KNOWN[tags] = found
    return _KNOWN[tags]


@lru_cache(maxsize=1024)
def _crs_text(crs) -> str:
    """The CRS as text, "" for none; finding its EPSG code can take tens of milliseconds."""
    try:
        return crs.to_string() if crs else ""
    except import_rasterio().errors.CRSError:
        return ""


def _check_header(path: Path, header: Header, like: Header) -> None:
    if header.bands != like.bands:
        raise Unfit("wrong bands", f"{path}: {header.bands}, those of the first are {like.bands}")
    units, others = (header.scales, header.offsets), (like.scales, like.offsets)
    if units != others:
        raise Unfit("wrong units", f"{path}: scales, offsets {units}, of the first {others}")


def check_grid(path: Path, grid: Grid, finest: Grid) -> None:
    """Raise Unfit where a file does not lie where the finest of its scene does."""
    if grid.crs and finest.crs and (grid.crs != finest.crs or not grid.covers(finest)):
        raise Unfit("mismatched grids", f"{path}: does not lie where the rest of the scene lies")
