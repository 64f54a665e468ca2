"""MultiEarth: deforestation in the Amazon from Sentinel-2, Sentinel-1 and Landsat."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from timo.data.contract import DataError, select_bands, with_progress
from timo.data.dates import parse_date, to_days
from timo.data.readers.common import (
    INCOMPLETE,
    SPLITS,
    PublishedSeries,
    choose,
    clean,
    map_labels,
    need_files,
    need_folder,
    read_raster,
)
from timo.data.readers.multiearth_netcdf import netcdf_layers, read_netcdf

SOURCE = "https://sites.google.com/view/rainforest-challenge"
CLASSES = ("intact", "deforested")
CLOUDS = 1 << 10 | 1 << 11  # bits of QA60: opaque clouds, cirrus
BASELINE_04 = np.datetime64("2022-01-25").astype(np.int64)  # DN are larger by 1000 from this day

_FILE = re.compile(
    r"(Sentinel1|Sentinel2|Landsat5|Landsat8|Deforestation)(?:_(\w+?))?"
    r"_(-?\d+\.\d\d)_(-?\d+\.\d\d)_(\d{4}_\d\d_\d\d)\.tiff?"
)


@dataclass(frozen=True)
class _Sensor:
    """What the files of a sensor hold: dtype, band of quality flags, and units."""

    dtype: str
    quality: str | None
    units: str

    def scaling(self, band: str) -> tuple[float, float]:
        """(scale, offset) of a band: physical = DN * scale + offset."""
        if self.dtype == "float32":
            return 1.0, 0.0
        if self.quality == "QA60":
            return 1e-4, 0.0
        # Landsat, Collection 2 Level 2: surface temperature in K, surface reflectance.
        return (3.41802e-3, 149.0) if band.startswith("ST_") else (2.75e-5, -0.2)


SENSORS = {
    "Sentinel2": _Sensor("uint16", "QA60", "reflectance"),
    "Sentinel1": _Sensor("float32", None, "dB"),
    "Landsat5": _Sensor("uint16", "QA_PIXEL", "reflectance"),
    "Landsat8": _Sensor("uint16", "QA_PIXEL", "reflectance"),
}


class MultiEarth(PublishedSeries):
    """Series of 256 x 256 pixels at 10 m (Landsat 85 x 85 at 30 m) with monthly deforestation maps.

    Layout: one TIFF for each band and date, anywhere below `root`, named
    `<Sensor>_<band>_<lon>_<lat>_<YYYY_MM_DD>.tiff`, without georeference; labels 0/1 named
    `Deforestation_<lon>_<lat>_<YYYY_MM_DD>.tiff`; or NetCDF files (`*.nc`) of images and of labels;
    where both hold the same, the TIFF is read. Sentinel-2 is uint16, reflectance = DN / 10000, its
    bands B1 ... B9 are called B01 ... B09 here; Sentinel-1 is float32 in dB; Landsat is Collection
    2 Level 2.

    A sample `<lon>_<lat>_<YYYY_MM_DD>` is one label with the acquisitions of its place in the
    `months` up to and including the label's month. A pixel is invalid where QA60 or QA_PIXEL says
    cloud, cirrus or cloud shadow, where a value is NaN, or where all bands of an integer sensor
    are 0. Landsat comes to the label's grid by nearest neighbour.

    Split: places fall into cells of 0.2 degrees, and the hash of a cell decides (3/5 train, 1/5
    val, 1/5 test). Images of neighbouring places overlap, so val leaves out places within 0.03
    degrees of a test cell, and train those near a val or test cell: no pixel is in two splits.

    Args:
        root: folder with the files.
        split: "train", "val", "test" or "all".
        sensor: a key of `SENSORS`.
        select: names of the bands to give out, in that order; None for every band that the copy
            holds.
        months: months of acquisitions up to the label's; None for all before.
        labels: False for one sample `<lon>_<lat>` with all acquisitions of a place, and no mask.
        clouds: use the quality band; False neither needs nor reads it.
        harmonised: Sentinel-2 of processing baseline 04.00 (from 2022-01-25 on) has its offset of
            1000 removed already; otherwise it is subtracted here, down to 1, since 0 is no data.
        incomplete: "error", or "skip" to leave out acquisitions that lack a band, with a warning.

    Raises:
        DataError: naming the file, for what is missing or not as published.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        sensor: str = "Sentinel2",
        select: Sequence[str] | None = None,
        months: int | None = 12,
        labels: bool = True,
        clouds: bool = True,
        harmonised: bool = False,
        incomplete: str = "error",
    ):
        choose("split", split, (*SPLITS, "all"))
        choose("incomplete", incomplete, INCOMPLETE)
        choose("sensor", sensor, tuple(SENSORS))
        if months is not None and months < 1:
            raise ValueError(f"months: must be at least 1, or None, got {months}")
        root = need_folder(root, "TIFF files named <Sensor>_<band>_<lon>_<lat>_<date>", SOURCE)
        self.sensor, self.harmonised = SENSORS[sensor], harmonised
        self._quality = self.sensor.quality if clouds else None
        files, masks = _scan(root, sensor)
        held = sorted({band for bands in files.values() for band in bands} - _FLAGS)
        if not held:
            raise DataError(
                f"{root}: holds no {sensor}_<band>_<lon>_<lat>_<date>.tiff and no NetCDF file of "
                f"{sensor}; get them from {SOURCE}"
            )
        bands = [held[i] for i in select_bands(held, select)]
        places = self._acquisitions(files, bands, incomplete)
        if labels:
            samples = _labelled(places, masks, months)
        else:
            samples = {f"{lon}_{lat}": (place, None) for (lon, lat), place in places.items()}
        self._samples = {n: s for n, s in samples.items() if split in ("all", split_of(n))}
        scale, offset = zip(*(self.sensor.scaling(band) for band in bands))
        super().__init__(
            root, split, self._samples, CLASSES,
            bands=bands, units=_units(self.sensor, bands), scale=scale, offset=offset,
        )  # fmt: skip

    def _acquisitions(self, files: dict, bands: list[str], incomplete: str) -> dict:
        """{(lon, lat): {day: layers of bands, then quality}}, complete ones only."""
        needed = [*bands, *([self._quality] if self._quality else [])]
        places: dict[tuple, dict[int, list]] = defaultdict(dict)
        missing: list[str] = []
        for (lon, lat, day), layers in sorted(files.items()):
            lacking = [band for band in needed if band not in layers]
            if lacking:
                stamp = str(np.datetime64(day, "D")).replace("-", "_")
                missing += [f"{band} of {lon}_{lat}_{stamp}" for band in lacking]
            else:
                places[lon, lat][day] = [layers[band] for band in needed]
        need_files(missing, len(files) * len(needed), "band files", SOURCE, incomplete)
        return places

    def _length(self, name: str) -> int:
        return len(self._samples[name][0])

    def _sample(self, name: str) -> dict:
        acquisitions, label = self._samples[name]
        mask = None if label is None else _read_label(label)
        size = None if self.sensor.quality == "QA_PIXEL" or mask is None else mask.shape
        images, usable = [], []
        for day, layers in acquisitions.items():
            pixels = _read(layers, self.sensor.dtype, size)
            size = pixels.shape[1:]
            image, valid = self._judge(pixels, day)
            images.append(image)
            usable.append(valid)
        image, valid = np.stack(images), np.stack(usable)
        if mask is not None:
            image, valid = _to_size(image, mask.shape), _to_size(valid, mask.shape)
        image, valid = clean(image, valid)
        sample = {"image": image, "dates": torch.tensor(list(acquisitions)), "valid": valid}
        return sample if mask is None else sample | {"mask": mask}

    def _judge(self, pixels: np.ndarray, day: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (C, H, W) and valid (H, W) of the bands and flags of one acquisition."""
        valid = np.ones(pixels.shape[1:], bool)
        image = pixels[: len(self.bands)]
        if self.sensor.dtype != "float32":
            valid = np.any(image, 0)
        if self._quality == "QA60":
            valid &= pixels[-1] & CLOUDS == 0
        elif self._quality == "QA_PIXEL":
            valid &= pixels[-1] & _LANDSAT_UNUSABLE == 0
        if self.sensor.quality == "QA60" and not self.harmonised and day >= BASELINE_04:
            image = np.where(image > 0, image.clip(1001) - 1000, 0).astype(image.dtype)
        return image, valid


_FLAGS = {"QA60", "QA_PIXEL", "QA_RADSAT"}
_LANDSAT_UNUSABLE = 0b11111  # fill, dilated cloud, cirrus, cloud, cloud shadow


def _units(sensor: _Sensor, bands: list[str]) -> str:
    kelvin = [band for band in bands if band.startswith("ST_")]
    return sensor.units + (f"; {', '.join(kelvin)} in K" if kelvin else "")


def split_of(name: str) -> str | None:
    """Split of the place that `name`, `<lon>_<lat>[_...]`, begins with; None too near a border."""
    lon, lat = (round(100 * float(part)) for part in name.split("_")[:2])  # degrees / 100
    own = _cell_split(lon // 20, lat // 20)
    near = {
        _cell_split((lon + east) // 20, (lat + north) // 20)
        for east in (-3, 0, 3)
        for north in (-3, 0, 3)
    }
    if own == "train" and near != {"train"} or own == "val" and "test" in near:
        return None
    return own


def _cell_split(column: int, row: int) -> str:
    draw = hashlib.sha256(f"{column},{row}".encode()).digest()[0] % 5
    return ("train", "train", "train", "val", "test")[draw]


def _scan(root: Path, sensor: str) -> tuple[dict, dict]:
    """{(lon, lat, day): {band: layer}} of `sensor`, and {(lon, lat, month): layer} of all labels.

    A layer is the path of a TIFF, or (path of a NetCDF file, number of its layer).
    """
    files: dict[tuple, dict] = defaultdict(dict)
    masks: dict = {}
    for path in with_progress(sorted(root.rglob("*")), "names of files"):
        if path.suffix == ".nc":
            source, found = netcdf_layers(path, (sensor, "Deforestation"))
            for (lon, lat, day, band), number in found.items():
                if source == "Deforestation":
                    key, there = (lon, lat, day), masks
                else:
                    key, there = _band_name(band), files[lon, lat, day]
                if isinstance(there.get(key), tuple):
                    raise DataError(
                        f"{there[key][0]} and {path} hold the same acquisition; keep one"
                    )
                there.setdefault(key, (path, number))
            continue
        match = _FILE.fullmatch(path.name)
        if not match or match[1] not in (sensor, "Deforestation"):
            continue
        kind, band, lon, lat, stamp = match.groups()
        try:
            day = int(to_days([parse_date(stamp)])[0])
        except ValueError as error:
            raise DataError(f"{path}: its name holds no date ({error})") from None
        if kind == "Deforestation":
            key, there = (lon, lat, day), masks
        else:
            key, there = _band_name(band or ""), files[lon, lat, day]
        if isinstance(there.get(key), Path):
            raise DataError(f"{there[key]} and {path} are the same acquisition; keep one")
        there[key] = path
    return files, masks


def _band_name(held: str) -> str:
    return re.sub(r"^B(\d)$", r"B0\1", held)


def _labelled(places: dict, masks: dict, months: int | None) -> dict:
    """{name: ({day: paths}, label)} of every label that has acquisitions."""
    samples, bare = {}, []
    for (lon, lat, day), label in sorted(masks.items(), key=lambda item: item[0]):
        month = np.datetime64(day, "D").astype("datetime64[M]")
        first = -np.inf if months is None else _first_day(month + 1 - months)
        series = {
            when: paths
            for when, paths in places.get((lon, lat), {}).items()
            if first <= when < _first_day(month + 1)
        }
        name = f"{lon}_{lat}_{str(np.datetime64(day, 'D')).replace('-', '_')}"
        if series:
            samples[name] = (series, label)
        else:
            bare.append(name)
    need_files(bare, len(masks), "acquisitions for labels", SOURCE, "skip")
    return samples


def _first_day(month: np.datetime64) -> int:
    return int(month.astype("datetime64[D]").astype(np.int64))


def _read(layers: list, dtype: str, size: Sequence[int] | None = None) -> np.ndarray:
    """Pixels (len(layers), H, W); of layers that one NetCDF file holds all at once."""
    pixels = []
    for path, some in groupby(layers, key=lambda at: at if isinstance(at, Path) else at[0]):
        some = list(some)
        if some[0] is path:
            pixels += [read_raster(path, 1, dtype, size)[0][0] for _ in some]
        else:
            pixels += list(read_netcdf(path, [number for _, number in some], dtype))
        size = size or pixels[0].shape
        if pixels[-1].shape != tuple(size):
            raise DataError(f"{path}: holds {pixels[-1].shape} pixels; others of its place {size}")
    return np.stack(pixels)


def _read_label(label: Path | tuple[Path, int]) -> torch.Tensor:
    path = label if isinstance(label, Path) else label[0]
    return map_labels(_read([label], "uint8")[0], {0: 0, 1: 1}, path)


def _to_size(frames: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """`frames` (..., h, w) at `size`, the nearest pixel for each."""
    h, w = frames.shape[-2:]
    if (h, w) == tuple(size):
        return frames
    rows = (2 * np.arange(size[0]) + 1) * h // (2 * size[0])
    cols = (2 * np.arange(size[1]) + 1) * w // (2 * size[1])
    return frames[..., rows[:, None], cols]
