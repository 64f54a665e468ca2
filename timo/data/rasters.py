"""A folder of dated rasters as a dataset."""

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from timo.data.contract import IGNORE_INDEX, DataError, select_bands
from timo.data.dates import date_of_name, is_date, order_of, parse_date, to_days
from timo.data.series import Labels, Series, WindowedSeries, sample_folders, tensor_dtype
from timo.data.windows import open_raster

RASTERS = "rasters named <date>[_<anything>].tif"


class RasterSeries(WindowedSeries):
    """Folder of dated rasters, or folder of such folders, as a dataset of windows.

    Layout: `<root>[/<sample>]/<date>[_<anything>].tif`, one file with all bands for each date
    (forms of the date: `timo.data.dates`), and optionally
    `mask.tif` (labels of the whole series), `<date>_mask.tif` (labels of one date; dates without
    one are 255 everywhere) and `<date>_valid.tif` (0 = not usable); an image `<name>.tif` may also
    have `<name>_mask.tif` and `<name>_valid.tif`. `<root>/labels.csv` gives classes of series or of
    dates (`timo.data.labels`).

    A pixel is valid where no selected band is nodata, masked inside the file, NaN or infinite,
    and the validity file is neither 0 nor its own nodata. Values that are nodata, NaN or infinite
    become 0. Files are read by window and opened where they are read, so workers share no handle.

    Args:
        root: the folder; `samples` names the subfolders to use (None: all).
        bands: names of the bands that the files hold, in file order; None takes the descriptions
            in the files, or band1, band2, ... where they have none.
        select: names of the bands to give out, in that order; None for all.
        nodata: value without data, in place of the files' own tag.
        units, scale, offset: physical = raw * scale + offset, one number or one for each selected
            band; None takes the files' own scale and offset (1 and 0 where they state none).
        tile, stride, region, min_valid, labels, ignore_label, cache: as in WindowedSeries.

    Raises:
        DataError: naming the file, for what cannot be read, dates that are missing or double,
            grids, bands or types that differ between dates.
    """

    def __init__(
        self,
        root: str | Path,
        bands: Sequence[str] | None = None,
        select: Sequence[str] | None = None,
        nodata: float | None = None,
        units: str = "DN",
        scale: float | Sequence[float] | None = None,
        offset: float | Sequence[float] | None = None,
        tile: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        region: Sequence[float] | None = None,
        min_valid: float = 0.0,
        labels: Labels | None = None,
        ignore_label: int | None = None,
        cache: bool = False,
        samples: Sequence[str] | None = None,
    ):
        root = Path(root)
        self._nodata = nodata
        folders = sample_folders(root, samples, holds_rasters, RASTERS)
        self._files = [_scan(folder) for folder in folders]
        named = bands is not None
        headers = [_one_grid(files, named) for files in self._files]
        first, first_path = headers[0], self._files[0].images[0]
        for header, files in zip(headers, self._files):
            _same_content(first, first_path, header, files.images[0], named)
        tagged = all(header.nodata is not None for header in headers)
        stated = first.nodata if nodata is None and tagged else nodata
        self.nodata = stated if stated == stated else None  # not NaN
        held = _band_names(bands, first, first_path)
        self._positions = select_bands(held, select)
        super().__init__(
            root,
            [
                Series(
                    Path(os.path.abspath(folder)).name, to_days(files.dates),
                    h.height, h.width, h.crs, h.transform,
                )
                for folder, files, h in zip(folders, self._files, headers)
            ],
            tile, stride, region, min_valid, labels, ignore_label, cache,
            bands=[held[i] for i in self._positions],
            units=units,
            scale=[first.scales[i] for i in self._positions] if scale is None else scale,
            offset=[first.offsets[i] for i in self._positions] if offset is None else offset,
        )  # fmt: skip

    def _read(self, number, row, col, h, w):
        files, box = self._files[number], (row, col, h, w)
        bands = [i + 1 for i in self._positions]
        images, valids, masks = [], [], []
        for path, valid_path, mask_path in zip(files.images, files.valids, files.masks):
            image, usable = _read_bands(path, bands, box, self._nodata)
            valid = usable.all(0)
            if valid_path is not None:
                (flags,), (known,) = _read_bands(valid_path, [1], box)
                valid &= (flags != 0) & known
            images.append(np.where(usable, image, np.zeros((), image.dtype)))
            valids.append(valid)
            if files.per_date_masks:
                masks.append(_read_labels(mask_path, box))
        mask = np.stack(masks) if masks else None
        if files.mask is not None:
            mask = _read_labels(files.mask, box)
        return np.stack(images), np.stack(valids), mask


@dataclass
class _Files:
    """The files of one series, by ascending date; None where a date has none."""

    dates: list[np.datetime64]
    images: list[Path]
    valids: list[Path | None]
    masks: list[Path | None]
    mask: Path | None

    @property
    def per_date_masks(self) -> bool:
        return any(self.masks)


@dataclass
class _Header:
    """What must agree between files."""

    height: int
    width: int
    crs: Any
    transform: Any
    dtype: str
    count: int
    descriptions: tuple
    scales: tuple
    offsets: tuple
    nodata: float | None


class Listing(NamedTuple):
    """The rasters of a folder, told apart by their names."""

    images: list[Path]  # by name, with or without a date
    companions: dict[str, dict[Path, Path]]  # "valid" and "mask": image -> its raster
    mask: Path | None  # labels of the whole series


def list_rasters(folder: Path) -> Listing:
    """What the rasters of a folder are; hidden files are none.

    `<date>_valid.tif` and `<date>_mask.tif` belong to the images of that date in whatever form, or
    to the only one of that day; `<image>_valid.tif` and `<image>_mask.tif` to the image of that
    name. Raises DataError where one has no image, or an image has two of a kind.
    """
    found = _rasters(folder)
    stems = {path.stem for path in found if path.stem != "mask"}
    images, others, mask = [], [], None
    for path in found:
        start, _, role = path.stem.rpartition("_")
        if path.stem == "mask":
            mask = path
        elif role in ("valid", "mask") and (start in stems or is_date(start)):
            others.append((path, role, parse_date(start) if is_date(start) else start))
        else:
            images.append(path)
    owners: dict[np.datetime64 | str, list[Path]] = defaultdict(list)  # by date, and by name
    of_day: dict[np.datetime64 | str, list[Path]] = defaultdict(list)
    for path in images:
        owners[path.stem].append(path)
        with suppress(DataError):
            date = date_of_name(path)
            owners[date].append(path)
            of_day[date.astype("datetime64[D]").astype(date.dtype)].append(path)
    companions: dict[str, dict[Path, Path]] = {"valid": {}, "mask": {}}
    for path, role, owner in others:
        if owner not in owners and len(of_day.get(owner, ())) == 1:
            owners[owner] = of_day[owner]
        if owner not in owners:
            raise DataError(
                f"{path}: no image of the same date or name lies beside it; _{role} at the end of "
                f"a name means the {role} raster of an image: add the image or rename the file"
            )
        for image in owners[owner]:
            double = companions[role].setdefault(image, path)
            if double != path:
                raise DataError(f"{double} and {path} both belong to {image.name}; keep one")
    return Listing(images, companions, mask)


def holds_rasters(folder: Path) -> bool:
    """Whether rasters lie in the folder itself."""
    return bool(_rasters(folder))


def _rasters(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir()
        if p.suffix.lower() in (".tif", ".tiff") and not p.name.startswith(".")
    )  # fmt: skip


def _scan(folder: Path) -> _Files:
    images, companions, mask = list_rasters(folder)
    if not images:
        raise DataError(f"{folder}: holds no {RASTERS}")
    dates = [date_of_name(path) for path in images]
    order = order_of(dates, images)
    dates, images = [dates[i] for i in order], [images[i] for i in order]
    if mask is not None and companions["mask"]:
        raise DataError(f"{mask}: lies beside {next(iter(companions['mask'].values()))}; keep one "
                        "mask for the series, or one for each date")  # fmt: skip
    valids, masks = ([companions[role].get(path) for path in images] for role in ("valid", "mask"))
    return _Files(dates, images, valids, masks, mask)


def _one_grid(files: _Files, named: bool) -> _Header:
    """Header of the first date, after checking that every file of the series shares its grid.

    `named`: the bands have names whatever the descriptions in the files.
    """
    first_path = files.images[0]
    first = _header(first_path)
    for path in files.images[1:]:
        header = _header(path)
        _same_grid(first, first_path, header, path)
        _same_content(first, first_path, header, path, named)
    for path in filter(None, [*files.valids, *files.masks, files.mask]):
        header = _header(path)
        _same_grid(first, first_path, header, path)
        if header.count != 1:
            raise DataError(
                f"{path}: must have 1 band, has {header.count}; write one <date>_mask.tif or "
                "<date>_valid.tif for each date"
            )
        if np.dtype(header.dtype).kind not in "iu":
            raise DataError(f"{path}: must hold integers, holds {header.dtype}")
    return first


def _same_grid(first: _Header, first_path: Path, header: _Header, path: Path) -> None:
    differs = None
    if header.crs != first.crs:
        differs = "CRS", header.crs, first.crs
    elif (header.height, header.width) != (first.height, first.width):
        differs = (
            "size", f"{header.height} x {header.width}", f"{first.height} x {first.width} pixels"
        )  # fmt: skip
    elif not _aligned(first, header):
        differs = "transform", tuple(header.transform)[:6], tuple(first.transform)[:6]
    if differs:
        what, its, others = differs
        (left, top), (right, bottom) = _corners(first)
        raise DataError(
            f"{path}: its {what} is {its}, that of {first_path} is {others}; all files of a series "
            f"must lie on one grid: gdalwarp -t_srs {first.crs} -te {left} {bottom} {right} {top} "
            f"-ts {first.width} {first.height} {path.name} <output>.tif"
        )


def _aligned(first: _Header, other: _Header) -> bool:
    """Whether opposite corners of two grids of one size lie within a hundredth of a pixel."""
    t = first.transform
    pixel = min(np.hypot(t.a, t.d), np.hypot(t.b, t.e))
    return bool(np.abs(np.subtract(_corners(first), _corners(other))).max() <= 0.01 * pixel)


def _corners(header: _Header) -> tuple[tuple[float, float], tuple[float, float]]:
    """Map coordinates of the upper left and the lower right corner."""
    t, w, h = header.transform, header.width, header.height
    return (t.c, t.f), (t.a * w + t.b * h + t.c, t.d * w + t.e * h + t.f)


def _same_content(
    first: _Header, first_path: Path, header: _Header, path: Path, named: bool
) -> None:
    for what, remedy in (
        ("count", "write the same bands for every date"),
        ("dtype", "convert with gdal_translate -ot"),
        (
            "descriptions",
            "write the same bands in the same order for every date, or name them with bands=",
        ),
        ("scales", "convert all dates to one scaling: a series has one scale for each band"),
        ("offsets", "convert all dates to one offset: a series has one offset for each band"),
    ):
        its, others = getattr(header, what), getattr(first, what)
        if its != others and not (named and what == "descriptions"):
            name = {"count": "band count", "descriptions": "band descriptions"}.get(what, what)
            raise DataError(
                f"{path}: its {name} is {its}, that of {first_path} is {others}; {remedy}"
            )


def _band_names(bands: Sequence[str] | None, header: _Header, path: Path) -> list[str]:
    if bands is None:
        return [text or f"band{i}" for i, text in enumerate(header.descriptions, 1)]
    if isinstance(bands, str) or len(bands) != header.count:
        raise DataError(
            f"bands: must name all {header.count} bands of {path.name} in file order, got {bands} "
            "(select= picks some of them)"
        )
    return list(bands)


def _header(path: Path) -> _Header:
    with open_raster(path) as file:
        if len(set(file.dtypes)) > 1:
            raise DataError(f"{path}: its bands have several types {file.dtypes}; use one")
        try:
            tensor_dtype(np.dtype(file.dtypes[0]))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: {error}") from None
        return _Header(
            file.height, file.width, file.crs, file.transform, file.dtypes[0], file.count,
            file.descriptions, file.scales, file.offsets, file.nodata,
        )  # fmt: skip


def _read_bands(
    path: Path, bands: list[int], box: tuple[int, int, int, int], nodata: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (C, h, w) as on disk, and where they hold data, bool (C, h, w)."""
    from rasterio.enums import MaskFlags
    from rasterio.windows import Window

    row, col, h, w = box
    window = Window(col, row, w, h)
    with open_raster(path) as file:
        image = file.read(bands, window=window)
        if nodata is None:
            return image, file.read_masks(bands, window=window) > 0
        usable = ~np.isnan(image) if np.isnan(nodata) else image != nodata
        if MaskFlags.per_dataset in file.mask_flag_enums[0]:
            usable &= file.read_masks(bands, window=window) > 0
        return image, usable


def _read_labels(path: Path | None, box: tuple[int, int, int, int]) -> np.ndarray:
    """Labels (h, w) int64; 255 at the file's nodata, and everywhere where there is no file."""
    if path is None:
        return np.full(box[2:], IGNORE_INDEX, np.int64)
    labels, usable = _read_bands(path, [1], box)
    return np.where(usable[0], labels[0].astype(np.int64), IGNORE_INDEX)
