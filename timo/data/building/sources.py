"""Where the scenes of a store come from."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from timo.data.building.choose import Candidates, Scene
from timo.data.building.tiffs import (
    Grid,
    Header,
    Unfit,
    check_grid,
    gdal_settings,
    header_of,
    open_tiff,
    read_tiff,
)
from timo.data.contract import DataError
from timo.data.dates import date_of_name
from timo.data.locations import LocationSeries, location_dtype
from timo.data.published import PublishedCorpus
from timo.data.rasters import RASTERS, holds_rasters, list_rasters
from timo.data.series import sample_folders, subfolders_of
from timo.data.simulate import SimulatedSeries
from timo.data.store import sha256
from timo.data.windows import grid_windows, import_rasterio


@dataclass(frozen=True)
class Content:
    """What all locations of a source hold: names of bands, dtype, and physical units."""

    bands: tuple[str, ...]
    dtype: str
    units: str = "DN"
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()


class Source(ABC):
    """Base: names of locations in an order that does not depend on the file system, and scenes.

    Workers read; sources travel to them, so they hold settings and names only.
    """

    content: Content
    size: int  # pixels of a side of a location

    def inputs(self) -> dict:
        """What else tells one source from another when a build goes on."""
        return {}

    @abstractmethod
    def names(self) -> list[str]:
        """Locations, sorted."""

    @abstractmethod
    def load(self, name: str) -> Candidates:
        """Every scene of a location; what cannot be read is among the rejected."""


class TiffSource(Source):
    """Folders of GeoTIFF, a location in each window of `size` pixels; subclasses list the files.

    Bands of a coarser grid, an integer number of times smaller, are repeated. All scenes of a
    location must lie on one grid within half a pixel; those that do not are rejected.
    """

    def __init__(self, root: Path, size: int):
        if not root.is_dir():
            raise DataError(f"root: {root} is not a folder")
        self.root, self.size = root, size

    @abstractmethod
    def scenes_of(self, folder: Path) -> list["Files"]:
        """Files of every scene in the folder of a location, ascending by name."""

    def load(self, name: str) -> Candidates:
        folder, corner = name, ""
        if "@" in name and not (self.root / name).is_dir():
            folder, _, corner = name.rpartition("@")
        window = tuple(map(int, corner.split(","))) if corner else None
        found = Candidates([])
        grids = []
        with gdal_settings():
            for files in self.scenes_of(self.root / folder):
                try:
                    moment = date_of_name(files.named)
                    pixels, grid, cloudy = self._read(files, window)
                except Unfit as error:
                    found.rejected.append((files.source, *error.args))
                except DataError as error:
                    found.rejected.append((files.source, "no date", str(error)))
                else:
                    found.scenes.append(Scene(files.source, moment, pixels, cloudy))
                    grids.append(grid)
            if grids:
                self._keep_one_grid(found, grids, window)
        return found

    def _read(self, files: "Files", window) -> tuple[np.ndarray, Grid, np.ndarray | None]:
        """Pixels (C, size, size), where they lie, and clouds (size, size) if they are marked."""
        read = [
            read_tiff(path, bands, window, self.size, files.like) for path, bands in files.images
        ]
        for plane, _, _ in read:
            if plane.dtype.name != self.content.dtype:
                detail = f"{files.named}: {plane.dtype}, not {self.content.dtype}"
                raise Unfit("wrong type", detail)
        finest = max(range(len(read)), key=lambda i: read[i][0].shape[1])
        _, height, width = read[finest][0].shape
        planes = [_repeated(plane, height, width, files) for plane, _, _ in read]
        grid = read[finest][1]
        for (path, _), (_, other, _) in zip(files.images, read):
            check_grid(path, other, grid)
        row, col = (height - self.size) // 2, (width - self.size) // 2
        if row < 0 or col < 0:
            need = f"at least {self.size} x {self.size} are needed"
            raise Unfit("wrong size", f"{files.named}: {height} x {width} pixels, {need}")
        box = np.s_[:, row : row + self.size, col : col + self.size]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes)
        known = [held for _, _, held in read if held is not None]
        if len(known) == len(read):
            held = [_repeated(plane[None], height, width, files)[0] for plane in known]
            # 0 in every band is no data in the store, here it is dark ground.
            pixels[:, np.all(held, axis=0) & ~pixels.any(0)] = 1
        cloudy = None
        if files.valid is not None:
            usable, other, _ = read_tiff(files.valid, [1], window, self.size)
            if window and (other.height, other.width) != (grid.height, grid.width):
                raise Unfit("wrong size", f"{files.valid}: is not of the size of {files.named}")
            check_grid(files.valid, other, grid)
            cloudy = _repeated(usable, height, width, files)[box][0] == 0
        return np.ascontiguousarray(pixels[box]), grid, cloudy

    def _keep_one_grid(self, found: Candidates, grids: list[Grid], window) -> None:
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
        return [folder.name for folder in subfolders_of(self.root)]

    def scenes_of(self, folder: Path) -> list["Files"]:
        scenes = []
        for scene in subfolders_of(folder):
            images = [(scene / _band_file(band), [1]) for band in self.content.bands]
            scenes.append(Files(scene.name, scene, images))
        return scenes


class RasterSource(TiffSource):
    """`<root>[/<location>]/<date>[_<anything>].tif`, and `_valid.tif`, named as for RasterSeries.

    Series larger than `size` give a location for each window of a grid without overlap.
    """

    def __init__(
        self, root: Path, size: int, bands: Sequence[str] | None, dtype: str | None = None
    ):
        super().__init__(root, size)
        self._folders = [folder.name for folder in subfolders_of(root)]
        if not self._folders or holds_rasters(root):
            (root,) = sample_folders(root.resolve(), None, holds_rasters, RASTERS)
            self.root, self._folders = root.parent, [root.name]
        self._first = first = self._first_header()
        if bands is not None and len(bands) != len(first.bands):
            raise DataError(f"bands: the rasters hold {len(first.bands)} bands, got {bands}")
        dtype = location_dtype(dtype or first.dtype, root).name
        names = tuple(bands or first.bands)
        self.content = Content(names, dtype, "DN", first.scales, first.offsets)

    def names(self) -> list[str]:
        names = []
        for folder in self._folders:
            try:
                header = next(self._headers(folder), None)
            except DataError:
                header = None  # `load` will log it
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
        listed, bands = list_rasters(folder), list(range(1, len(self.content.bands) + 1))
        valids = listed.companions["valid"]
        return [
            Files(path.name, path, [(path, bands)], valids.get(path), self._first)
            for path in listed.images
        ]

    def _headers(self, folder: str) -> Iterator[Header]:
        with gdal_settings():
            for path in list_rasters(self.root / folder).images:
                try:
                    with open_tiff(path) as file:
                        yield header_of(file)
                except import_rasterio().errors.RasterioError:
                    continue  # `load` will log it

    def _first_header(self) -> Header:
        reason = f"{self.root}: holds no raster <date>[_<anything>].tif that can be read"
        for folder in self._folders:
            try:
                for header in self._headers(folder):
                    return header
            except DataError as error:
                reason = str(error)
        raise DataError(reason)


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

    def inputs(self) -> dict:
        if isinstance(self.series, SimulatedSeries):
            return {"simulation": self.series.arguments}
        if isinstance(self.series, PublishedCorpus):
            return {"csv": sha256(self.series.table)}
        return {}

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

    `source` names the scene in logs, and the name of `named` begins with its date. The images
    must have the bands and units of `like`, if any.
    """

    source: str
    named: Path
    images: list[tuple[Path, list[int]]]
    valid: Path | None = None
    like: Header | None = None


def _repeated(plane: np.ndarray, height: int, width: int, files: Files) -> np.ndarray:
    """`plane` (C, h, w) on a grid of (height, width), every pixel repeated."""
    h, w = plane.shape[-2:]
    factor = height // h
    if (h * factor, w * factor) != (height, width):
        raise Unfit(
            "wrong size", f"{files.named}: bands of {h} x {w} and {height} x {width} pixels"
        )
    return plane if factor == 1 else plane.repeat(factor, 1).repeat(factor, 2)


def _band_file(band: str) -> str:
    """SeCo's files are named B2.tif where Sentinel-2's band is B02."""
    number = band.removeprefix("B")
    return f"B{int(number)}.tif" if number.isdecimal() else f"{band}.tif"
