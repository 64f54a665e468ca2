"""Where the scenes of a store come from."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from timo.data.building.choose import Candidates, Scene
from timo.data.contract import DataError
from timo.data.dates import date_of_name, is_date
from timo.data.locations import LocationSeries, location_dtype
from timo.data.simulate import SimulatedSeries
from timo.data.windows import grid_windows, import_rasterio

# Looking for side files would list the folder of every raster.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Content:
    """What all locations of a source hold: names of bands, dtype, and physical units."""

    bands: tuple[str, ...]
    dtype: str
    units: str = "DN"
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()


class Source:
    """Base: names of locations in an order that does not depend on the file system, and scenes.

    Workers read; sources travel to them, so they hold settings and names only.
    """

    content: Content

    def names(self) -> list[str]:
        """Locations, sorted."""
        raise NotImplementedError

    def load(self, name: str) -> Candidates:
        """Every scene of a location; what cannot be read is among the rejected."""
        raise NotImplementedError


class TiffSource(Source):
    """Folders of GeoTIFF, a location in each window of `size` pixels; subclasses list the files.

    Bands of a coarser grid, an integer number of times smaller, are repeated. All scenes of a
    location must lie on one grid within half a pixel; those that do not are rejected.
    """

    def __init__(self, root: Path, size: int):
        if not root.is_dir():
            raise DataError(f"root: {root} is not a folder")
        self.root, self.size = root, size

    def scenes_of(self, folder: Path) -> list["Files"]:
        """Files of every scene in the folder of a location, ascending by name."""
        raise NotImplementedError

    def load(self, name: str) -> Candidates:
        folder, _, corner = name.partition("@")
        window = tuple(map(int, corner.split(","))) if corner else None
        found = Candidates([])
        grids = []
        with _gdal():
            for files in self.scenes_of(self.root / folder):
                try:
                    moment = date_of_name(files.named)
                    pixels, grid, cloudy = self._read(files, window)
                except _Unfit as error:
                    found.rejected.append((files.source, *error.args))
                except DataError as error:
                    found.rejected.append((files.source, "no date", str(error)))
                else:
                    found.scenes.append(Scene(files.source, moment, pixels, cloudy))
                    grids.append(grid)
            if grids:
                self._keep_one_grid(found, grids, window)
        return found

    def _read(self, files: "Files", window) -> tuple[np.ndarray, "Grid", np.ndarray | None]:
        """Pixels (C, size, size), where they lie, and clouds (size, size) if they are marked."""
        read = [_read_tiff(path, bands, window, self.size) for path, bands in files.images]
        for plane, _ in read:
            if plane.dtype.name != self.content.dtype:
                detail = f"{files.named}: {plane.dtype}, not {self.content.dtype}"
                raise _Unfit("wrong type", detail)
        finest = max(range(len(read)), key=lambda i: read[i][0].shape[1])
        _, height, width = read[finest][0].shape
        planes = [_repeated(plane, height, width, files) for plane, _ in read]
        row, col = (height - self.size) // 2, (width - self.size) // 2
        if row < 0 or col < 0:
            need = f"at least {self.size} x {self.size} are needed"
            raise _Unfit("wrong size", f"{files.named}: {height} x {width} pixels, {need}")
        box = np.s_[:, row : row + self.size, col : col + self.size]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes)
        cloudy = None
        if files.valid is not None:
            usable, _ = _read_tiff(files.valid, [1], window, self.size)
            cloudy = _repeated(usable, height, width, files)[box][0] == 0
        return np.ascontiguousarray(pixels[box]), read[finest][1], cloudy

    def _keep_one_grid(self, found: Candidates, grids: list["Grid"], window) -> None:
        """Keep the scenes on the most frequent grid, and note where its centre lies."""
        (usual, _), *_ = Counter(grids).most_common(1)
        apart = [not grid.same(usual) for grid in grids]
        for scene, other in zip(found.scenes, apart):
            if other:
                found.rejected.append(
                    (scene.source, "other grid", "not on the grid of most scenes of the location")
                )
        found.scenes = [scene for scene, other in zip(found.scenes, apart) if not other]
        found.centre = usual.centre(window, self.size)


class SecoSource(TiffSource):
    """`<root>/<location>/<YYYYMMDDThhmmss>_.../<band>.tif`: a file for each band.

    Bands go by Sentinel-2's names, as "B02" and "B8A"; their files are named B2.tif and B8A.tif.
    """

    def __init__(
        self, root: Path, size: int, bands: Sequence[str] | None, dtype: str | None = None
    ):
        super().__init__(root, size)
        bands = tuple(bands or ("B04", "B03", "B02"))
        self.content = Content(bands, dtype or "uint8")
        location_dtype(self.content.dtype, "dtype")

    def names(self) -> list[str]:
        return _subfolders(self.root)

    def scenes_of(self, folder: Path) -> list["Files"]:
        scenes = []
        for name in _subfolders(folder):
            images = [(folder / name / _band_file(band), [1]) for band in self.content.bands]
            scenes.append(Files(name, folder / name, images))
        return scenes


class RasterSource(TiffSource):
    """`<root>[/<location>]/<date>[_<anything>].tif` as RasterSeries reads it, and `_valid.tif`.

    Series larger than `size` give a location for each window of a grid without overlap.
    """

    def __init__(
        self, root: Path, size: int, bands: Sequence[str] | None, dtype: str | None = None
    ):
        super().__init__(root, size)
        self._folders = _subfolders(root)
        if not self._folders or _images(root):
            root = root.resolve()
            self.root, self._folders = root.parent, [root.name]
        names, kind, scales, offsets = self._first_header()
        if bands is not None and len(bands) != len(names):
            raise DataError(f"bands: the rasters hold {len(names)} bands, got {bands}")
        dtype = location_dtype(dtype or kind, root).name
        self.content = Content(tuple(bands or names), dtype, "DN", scales, offsets)

    def names(self) -> list[str]:
        names = []
        for folder in self._folders:
            header = next(self._headers(folder), None)
            # Where no file opens one location stays, so that the log says why.
            height, width = (header.height, header.width) if header else (0, 0)
            sides = self.size, self.size
            corners = [
                (row, col) for row, col in grid_windows(height, width, sides, sides)
                if row % self.size == 0 and col % self.size == 0
            ]  # fmt: skip
            single = len(corners) <= 1
            names += [folder] if single else [f"{folder}@{row},{col}" for row, col in corners]
        return names

    def scenes_of(self, folder: Path) -> list["Files"]:
        scenes, count = [], len(self.content.bands)
        for path in _images(folder):
            valid = path.with_name(f"{path.stem}_valid{path.suffix}")
            images = [(path, list(range(1, count + 1)))]
            scenes.append(Files(path.name, path, images, valid if valid.exists() else None))
        return scenes

    def _headers(self, folder: str) -> Iterator["_Header"]:
        rasterio = import_rasterio()
        with _gdal():
            for path in _images(self.root / folder):
                try:
                    with rasterio.open(path) as file:
                        bands = [text or f"band{i}" for i, text in enumerate(file.descriptions, 1)]
                        yield _Header(*file.shape, bands, file.dtypes[0], file.scales, file.offsets)
                except rasterio.errors.RasterioError:
                    continue  # `load` will log it

    def _first_header(self) -> tuple[list[str], str, tuple, tuple]:
        for folder in self._folders:
            for header in self._headers(folder):
                return header.bands, header.dtype, header.scales, header.offsets
        raise DataError(f"{self.root}: holds no raster <date>[_<anything>].tif that can be read")


class _Header(NamedTuple):
    height: int
    width: int
    bands: list[str]
    dtype: str
    scales: tuple[float, ...]
    offsets: tuple[float, ...]


class SeriesSource(Source):
    """Samples of a dataset in memory or on disk: simulated series, the published layout."""

    def __init__(self, series: SimulatedSeries | LocationSeries):
        shape = series.size if isinstance(series, SimulatedSeries) else series.shape[2:]
        if shape[0] != shape[1]:
            raise DataError(f"size: locations must be square, got {shape}")
        self.series, self.size = series, shape[0]
        dtype = "uint16" if isinstance(series, SimulatedSeries) else series.dtype.name
        self.content = Content(
            series.bands, dtype, series.units,
            tuple(series.scale.tolist()), tuple(series.offset.tolist()),
        )  # fmt: skip

    def names(self) -> list[str]:
        return [f"{index:06d}" for index in range(len(self.series))]

    def load(self, name: str) -> Candidates:
        if isinstance(self.series, LocationSeries):
            label, frames, days, _ = self.series.location(int(name))
            clouds = [None] * len(days)
        else:
            sample = self.series[int(name)]
            label, frames, days = sample["name"], sample["image"].numpy(), sample["dates"].numpy()
            clouds = [~valid for valid in sample["valid"].numpy()]
        moments = days.astype("datetime64[D]").astype("datetime64[s]")
        return Candidates([
            Scene(f"{label}/{number}", moment, np.array(pixels), cloudy)
            for number, (moment, pixels, cloudy) in enumerate(zip(moments, frames, clouds))
        ])  # fmt: skip


@dataclass(frozen=True)
class Files:
    """Files of a scene: (path, bands to read) of each, and of its validity.

    `source` names the scene in logs, and the name of `named` begins with its date.
    """

    source: str
    named: Path
    images: list[tuple[Path, list[int]]]
    valid: Path | None = None


@dataclass(frozen=True)
class Grid:
    """Georeference of a raster; `crs` as text, `transform` as its six numbers."""

    crs: str
    transform: tuple[float, ...]
    height: int
    width: int

    def same(self, other: "Grid") -> bool:
        """Whether both have one CRS and size, and corners within half a pixel."""
        if (self.crs, self.height, self.width) != (other.crs, other.height, other.width):
            return False
        corners = ((0, 0), (self.width, self.height))
        pixel = np.hypot(other.transform[0], other.transform[3])
        return all(
            np.abs(np.subtract(self.at(*c), other.at(*c))).max() <= 0.5 * pixel for c in corners
        )

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
    """Longitude and latitude of each, NaN for None; one call for each CRS, which is what costs."""
    found = [(float("nan"), float("nan"))] * len(centres)
    for crs in sorted({centre[0] for centre in centres if centre}):
        from rasterio.warp import transform

        at = [i for i, centre in enumerate(centres) if centre and centre[0] == crs]
        places = transform(crs, "EPSG:4326", *zip(*(centres[i][1:] for i in at)))
        for i, longitude, latitude in zip(at, *places):
            found[i] = float(longitude), float(latitude)
    return found


class _Unfit(Exception):
    """A scene that cannot enter the store: (reason, detail)."""


@contextmanager
def _gdal() -> Iterator[None]:
    rasterio = import_rasterio()
    with rasterio.Env(**_GDAL), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def _read_tiff(
    path: Path, bands: list[int], corner: tuple[int, int] | None, size: int
) -> tuple[np.ndarray, Grid]:
    """Pixels (C, H, W), 0 where a band says that there is no data, and the grid of the file.

    All of them, or the window of `size` pixels at the upper left `corner`.
    """
    rasterio = import_rasterio()
    from rasterio.enums import MaskFlags
    from rasterio.windows import Window

    try:
        with rasterio.open(path) as file:
            if file.count != len(bands):
                raise _Unfit(
                    "wrong bands", f"{path}: holds {file.count} bands, {len(bands)} are needed"
                )
            window = None if corner is None else Window(corner[1], corner[0], size, size)
            if window and (corner[0] + size > file.height or corner[1] + size > file.width):
                raise _Unfit("wrong size", f"{path}: has no {size} x {size} pixels at {corner}")
            pixels = file.read(bands, window=window)
            flags = {flag for band in file.mask_flag_enums for flag in band}
            zero = flags == {MaskFlags.nodata} and file.nodata == 0 and len(bands) == 1
            if flags != {MaskFlags.all_valid} and not zero:
                pixels[:, (file.read_masks(bands, window=window) == 0).any(0)] = 0
            crs = file.crs.to_string() if file.crs else ""
            return pixels, Grid(crs, tuple(file.transform)[:6], *file.shape)
    except rasterio.errors.RasterioError as error:
        missing = not path.exists()
        reason = "missing file" if missing else "unreadable"
        raise _Unfit(reason, f"{path}: {error.__cause__ or error}") from None


def _repeated(plane: np.ndarray, height: int, width: int, files: Files) -> np.ndarray:
    """`plane` (C, h, w) on a grid of (height, width), every pixel repeated."""
    h, w = plane.shape[-2:]
    factor = height // h
    if (h * factor, w * factor) != (height, width):
        raise _Unfit(
            "wrong size", f"{files.named}: bands of {h} x {w} and {height} x {width} pixels"
        )
    return plane if factor == 1 else plane.repeat(factor, 1).repeat(factor, 2)


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """Rasters of a series, without labels and validity, by name."""
    found = sorted(
        p for p in folder.iterdir()
        if p.suffix.lower() in (".tif", ".tiff") and not p.name.startswith(".")
    )  # fmt: skip
    return [p for p in found if p.stem != "mask" and not _is_companion(p)]


def _is_companion(path: Path) -> bool:
    start, _, role = path.stem.rpartition("_")
    return role in ("valid", "mask") and is_date(start)


def _band_file(band: str) -> str:
    """SeCo's files are named B2.tif where Sentinel-2's band is B02."""
    number = band.removeprefix("B")
    return f"B{int(number)}.tif" if number.isdecimal() else f"{band}.tif"
