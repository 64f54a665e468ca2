"""MTLCC: crop types north of Munich from all 13 bands of Sentinel-2 in 2016 and 2017."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from timo.data.contract import IGNORE_INDEX, DataError, select_bands, with_progress
from timo.data.dates import order_of, parse_date, to_days
from timo.data.readers.common import (
    INCOMPLETE,
    SPLITS,
    PublishedSeries,
    choose,
    clean,
    inside,
    map_labels,
    need_files,
    need_folder,
    read_raster,
    read_text,
)

SOURCE = "https://doi.org/10.5281/zenodo.5712933 or https://github.com/TUM-LMF/MTLCC-pytorch"
BANDS = {  # by resolution, in the order of the files
    10: ("B02", "B03", "B04", "B08"),
    20: ("B05", "B06", "B07", "B8A", "B11", "B12"),
    60: ("B01", "B09", "B10"),
}
ALL_BANDS = tuple(band for bands in BANDS.values() for band in bands)
TILEIDS = {"train": "train_fold0", "val": "test_fold0", "test": "eval"}

_FRAME = re.compile(r"(\d{8})_(10|20|60)m\.tif")
_LABEL_TYPES = ("uint8", "int16", "uint16", "int32")


class MTLCC(PublishedSeries):
    """Tiles of 24 x 24 or 48 x 48 pixels at 10 m, up to a year of dates, 17 crops.

    Layout: `<folder>/<tileid>/<YYYYMMDD>_{10,20,60}m.tif` with 4, 6 and 3 bands of uint16, top of
    atmosphere reflectance = DN / 10000 (processed before baseline 04.00, so without its offset),
    `<folder>/<tileid>/y.tif` with the ids of `classes.txt` (`id|name`, ids with gaps),
    `tileids/*.tileids` with one tile a line. Crops are numbered 0 ... in the order of their ids;
    0 is unknown and becomes 255. Coarser bands come to the 10 m grid by repeating each pixel 2 x 2
    or 6 x 6 times (nearest neighbour), so every value is a measured one. A pixel is invalid where
    a band is nodata or all bands are 0.

    Args:
        root: folder that holds tileids, classes.txt and the folders of tiles.
        split: "train" (train_fold0.tileids), "val" (test_fold0.tileids), "test" (eval.tileids), or
            "all". No two of them may share a tile.
        folders: folders of tiles; each tile of each folder is one sample `<folder>/<tileid>`. The
            copy with both years has data16 and data17.
        select: names of the bands to give out, in that order; None for all 13. Files of a
            resolution of which none is selected are not read.
        bands_10m: names of the bands of `*_10m.tif` in file order; the files do not name them.
        incomplete: "error", or "skip" to leave out tiles that lack files, with a warning.

    Raises:
        DataError: naming the file, for what is missing or not as published.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        folders: Sequence[str] = ("data",),
        select: Sequence[str] | None = None,
        bands_10m: Sequence[str] = BANDS[10],
        incomplete: str = "error",
    ):
        choose("split", split, (*SPLITS, "all"))
        choose("incomplete", incomplete, INCOMPLETE)
        root = need_folder(root, "tileids, classes.txt and data", SOURCE)
        if sorted(bands_10m) != sorted(BANDS[10]):
            raise ValueError(f"bands_10m: must name {BANDS[10]} in some order, got {bands_10m}")
        names = [ALL_BANDS[i] for i in select_bands(ALL_BANDS, select)]
        bands = BANDS | {10: tuple(bands_10m)}
        self._resolutions = {r: held for r, held in bands.items() if set(held) & set(names)}
        read = [band for held in self._resolutions.values() for band in held]
        self._positions = [read.index(band) for band in names]
        self._labels, classes = _classes(root / "classes.txt")
        self._tiles, missing = {}, []
        wanted = _wanted(root, split, folders)
        for folder in with_progress(wanted, "tiles"):
            tile, lacking = _tile(folder, self._resolutions)
            if not lacking:
                self._tiles[f"{folder.parent.name}/{folder.name}"] = tile
            missing += lacking
        need_files(missing, len(wanted), "tiles or their files", SOURCE, incomplete)
        super().__init__(
            root, split, self._tiles, classes, bands=names, units="reflectance", scale=1e-4
        )

    def _length(self, name: str) -> int:
        return len(self._tiles[name][1])

    def _sample(self, name: str) -> dict:
        frames, days, mask = self._tiles[name]
        labels, _, (crs, place) = read_raster(mask, None, _LABEL_TYPES)
        if (labels != labels[0]).any():
            raise DataError(f"{mask}: its bands differ; it must hold one map of labels")
        h, w = labels.shape[1:]
        images, usable = [], []
        for paths in frames:
            image, valid = [], []
            for resolution, path in paths.items():
                factor = resolution // 10
                if h % factor or w % factor:
                    raise DataError(
                        f"{mask}: has {h} x {w} pixels, which {resolution} m pixels do not fill; "
                        "tiles have 24 x 24 or 48 x 48"
                    )
                bands = self._resolutions[resolution]
                grid = (crs, _coarser(place, factor))
                size = (h // factor, w // factor)
                pixels, held, _ = read_raster(path, len(bands), "uint16", size, grid)
                image.append(_repeat(pixels, factor))
                valid.append(_repeat(held, factor))
            image = np.concatenate(image)
            usable.append(np.concatenate(valid).all(0) & image.any(0))
            images.append(image[self._positions])
        image, valid = clean(np.stack(images), np.stack(usable))
        mask = map_labels(labels[0], self._labels, mask)
        return {"image": image, "dates": torch.from_numpy(days), "valid": valid, "mask": mask}


def _classes(path: Path) -> tuple[dict[int, int], list[str]]:
    """(id on disk -> class, names) of classes.txt; id 0 is unknown and becomes 255."""
    named: dict[int, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        key, _, name = line.partition("|")
        if not key.strip().isdecimal() or not name.strip() or int(key) in named:
            raise DataError(
                f"{path}: line {number} is {line!r}; it must be <id>|<name>, each id once"
            )
        named[int(key)] = name.strip()
    crops = sorted(key for key in named if key)
    if not 1 <= len(crops) <= IGNORE_INDEX:
        raise DataError(f"{path}: names {len(crops)} classes beside 0; it must name 1 ... 255")
    table = {0: IGNORE_INDEX} | {key: number for number, key in enumerate(crops)}
    return table, [named[key] for key in crops]


def _wanted(root: Path, split: str, folders: Sequence[str]) -> list[Path]:
    """Folders of the tiles of a split, sorted; DataError where splits share a tile."""
    lists = {part: root / "tileids" / f"{stem}.tileids" for part, stem in TILEIDS.items()}
    chosen = SPLITS if split == "all" else (split,)
    ids = {
        part: {line.strip() for line in read_text(path).splitlines() if line.strip()}
        for part, path in lists.items()
        if part in chosen or path.is_file()
    }
    tiles = set().union(*(ids[part] for part in chosen))
    for part in ids.keys() - {split}:
        shared = sorted(ids[part] & tiles) if split != "all" else []
        if shared:
            raise DataError(
                f"{lists[part]}: shares {len(shared)} tiles with {lists[split]}, as {shared[:3]}; "
                f"a score would be of pixels learned from. Get the lists again from {SOURCE}"
            )
    for name in folders:
        if not (root / name).is_dir():
            there = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "tileids")
            raise DataError(f"{root / name}: is no folder; {root} has {there}: state folders=")
    return [inside(root / f, tile, lists[split if split != "all" else "train"])
            for f in sorted(set(folders)) for tile in sorted(tiles)]  # fmt: skip


def _tile(folder: Path, resolutions: dict) -> tuple[tuple, list[Path]]:
    """(files by ascending date, days, y.tif) of a tile, and the files that it lacks."""
    if not folder.is_dir():
        return (), [folder]
    held = {path.name: path for path in folder.iterdir()}
    lacking = [] if "y.tif" in held else [folder / "y.tif"]
    stamps = sorted({match[1] for match in map(_FRAME.fullmatch, held) if match})
    if not stamps:
        lacking.append(folder / "<YYYYMMDD>_10m.tif")
    frames = []
    for stamp in stamps:
        names = {resolution: f"{stamp}_{resolution}m.tif" for resolution in resolutions}
        lacking += [folder / name for name in names.values() if name not in held]
        frames.append({resolution: folder / name for resolution, name in names.items()})
    try:
        dates = [parse_date(stamp) for stamp in stamps]
    except ValueError as error:
        raise DataError(f"{folder}: a file is named by no date ({error})") from None
    order = order_of(dates, stamps)
    return (
        [frames[i] for i in order],
        to_days([dates[i] for i in order]),
        folder / "y.tif",
    ), lacking


def _repeat(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, 1).repeat(factor, 2)


def _coarser(transform: tuple, factor: int) -> tuple:
    """Coefficients (a, b, c, d, e, f) of the grid with the same corner and larger pixels."""
    a, b, c, d, e, f = transform
    return a * factor, b * factor, c, d * factor, e * factor, f
