"""SEN12-FLOOD: is there a flood in this image? Series of Sentinel-2 and Sentinel-1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from timo.data.contract import DataError, select_bands, with_progress
from timo.data.dates import parse_date, to_days
from timo.data.readers.common import (
    INCOMPLETE,
    SPLITS,
    PublishedSeries,
    choose,
    clean,
    inside,
    need_files,
    need_folder,
    read_json,
    read_raster,
)

SOURCE = "https://ieee-dataport.org/open-access/sen12-flood-sar-and-multispectral-dataset-flood-detection"
CLASSES = ("no flood", "flood")
_OPTICAL = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
_RADAR = ("VV", "VH")
_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
_APART = 0.01  # degrees, about 1 km: areas that lie closer than this are neighbours


@dataclass(frozen=True)
class _Image:
    date: np.datetime64
    prefix: Path  # of the files of its bands
    flooded: bool


class Sen12Flood(PublishedSeries):
    """Series of 337 places with a label for every image; 512 x 512 pixels at 10 m.

    Layout: `<root>/S2list.json` and `S1list.json` list the images of each place;
    `<root>/<place>/S2_<date>_<band>.tif` (uint16, 1e-4 reflectance, 0 = no data) and
    `<prefix>_corrected_{VV,VH}.tif` (float32, linear backscatter in geographic coordinates, 0 = no
    data). Every image that a list describes is read: its `count` is too small in published copies.

    Samples: `image` (T, C, H, W) uint16 of Sentinel-2, float32 of Sentinel-1, in ascending order
    of dates; `label` int64 (T,), 1 = flood; once flooded, places stay so in the published labels.

    Args:
        root: folder of the data set.
        split: "train", "val" or "test", about 70, 10 and 20 % of the places. Places that touch or
            overlap, by `geo` of the list, are in one part: see `split_places`. "all" for all.
        sensor: "s2" or "s1".
        select: names of the bands to give out, in that order; None for all.
        size: average the pixels to size x size, as float32; None for the pixels of the files.
            Images of Sentinel-1 differ in size between places and need it to be batched.
        incomplete: "error", or "skip" to leave out, with a warning, images that a copy lacks.
        protocol: "sound", or "published", whose validation part is its test part: the last fifth
            of the places by name. Published numbers chose their checkpoint on it.

    Raises:
        DataError: naming the file, for what is missing, cannot be read or does not fit together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        sensor: str = "s2",
        select: Sequence[str] | None = None,
        size: int | None = None,
        incomplete: str = "error",
        protocol: str = "sound",
    ):
        root = need_folder(root, "S2list.json, S1list.json and a folder for each place", SOURCE)
        choose("split", split, (*SPLITS, "all"))
        choose("incomplete", incomplete, INCOMPLETE)
        self.sensor = choose("sensor", sensor, ("s2", "s1"))
        choose("protocol", protocol, ("sound", "published"))
        if size is not None and size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        self.size = size
        optical = sensor == "s2"
        held = _OPTICAL if optical else _RADAR
        bands = [held[i] for i in select_bands(held, select)]
        self._suffixes = [f"_{band}.tif" if optical else f"_corrected_{band}.tif" for band in bands]
        path = root / f"{sensor.upper()}list.json"
        places = _read_list(path)
        if split == "all":
            names = list(places)
        elif protocol == "published":
            last = sorted(places)[round(len(places) * 0.8) :]
            names = [name for name in places if (name in last) == (split != "train")]
        else:
            parts = split_places({name: _box(path, name, held) for name, held in places.items()})
            names = [name for name, part in parts.items() if part == split]
        self._images: dict[str, list[_Image]] = {}
        lacking: list[Path] = []
        total = 0
        for name in with_progress(names, "places"):
            images = []
            for image in _images(path, root, name, places[name]):
                files = self._of(image)
                missing = [file for file in files if not file.is_file()]
                lacking, total = lacking + missing, total + len(files)
                images += [] if missing else [image]
            if images:
                self._images[name] = images
        need_files(lacking, total, "files of the images", SOURCE, incomplete)
        super().__init__(
            root, split, self._images, CLASSES,
            bands=bands,
            units="reflectance" if optical else "linear",
            scale=1e-4 if optical else 1.0,
        )  # fmt: skip

    def _of(self, image: _Image) -> list[Path]:
        return [image.prefix.with_name(image.prefix.name + suffix) for suffix in self._suffixes]

    def _length(self, name: str) -> int:
        return len(self._images[name])

    def _sample(self, name: str) -> dict:
        images, valids, grid, size = [], [], None, None
        for one in self._images[name]:
            frame, held, grid, size = self._frame(one, grid, size)
            # Dark pixels of one optical band may be 0; of backscatter none is.
            valid = (frame != 0).any(0) if self.sensor == "s2" else (frame != 0).all(0)
            images.append(frame)
            valids.append(valid & held)
        image, valid = clean(np.stack(images), np.stack(valids))
        if self.size is not None:
            image, valid = _averaged(image, valid, self.size)
        return {
            "image": image,
            "dates": torch.from_numpy(to_days([one.date for one in self._images[name]])),
            "valid": valid,
            "label": torch.tensor([int(one.flooded) for one in self._images[name]]),
        }

    def _frame(self, image: _Image, grid, size):
        """Bands (C, H, W) of an image, usable (H, W); on `grid` of `size`, that of the first."""
        dtype = "uint16" if self.sensor == "s2" else "float32"
        bands, helds = [], []
        own: Any
        own, shape = (grid, size) if self.sensor == "s2" else (None, None)
        for path in self._of(image):
            pixels, held, own = read_raster(path, 1, dtype, shape, own)
            shape = pixels.shape[1:]
            bands.append(pixels[0])
            helds.append(held[0])
        frame, held = np.stack(bands), np.all(helds, axis=0)
        if grid is None or (own, shape) == (grid, size):
            return frame, held, own, shape
        if own[0] is None or own[0] != grid[0]:
            raise DataError(
                f"{path}: its CRS is {own[0]}, that of the first pass is {grid[0]}; fetch it again"
            )
        # Passes of Sentinel-1 may have been cut out on grids of their own.
        return *_onto(frame, held, own, grid, size), grid, size


def split_places(boxes: dict[str, tuple[float, float, float, float] | None]) -> dict[str, str]:
    """Part of each place, from the box (west, south, east, north) in degrees of its area.

    Places whose boxes touch, or lie within a hundredth of a degree, form a group, and so do the
    neighbours of neighbours. Groups go, the largest first and then by name, to the part that is
    furthest below its share of 70, 10 and 20 %. A place without a box is a group of its own.
    """
    names = sorted(boxes)
    group = {name: name for name in names}
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            if group[name] != group[other] and _near(boxes[name], boxes[other]):
                old, new = group[other], group[name]
                group = {key: new if its == old else its for key, its in group.items()}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group[name], []).append(name)
    parts: dict[str, str] = {}
    counts = dict.fromkeys(_SHARES, 0)
    for members in sorted(groups.values(), key=lambda group: (-len(group), group[0])):
        part = min(counts, key=lambda part: (counts[part] / _SHARES[part], -_SHARES[part]))
        counts[part] += len(members)
        parts |= dict.fromkeys(members, part)
    return parts


def _near(a, b) -> bool:
    if a is None or b is None:
        return False
    return all(a[i] <= b[i + 2] + _APART and b[i] <= a[i + 2] + _APART for i in (0, 1))


def _read_list(path: Path) -> dict[str, dict]:
    places = read_json(path)
    if not isinstance(places, dict) or not all(isinstance(one, dict) for one in places.values()):
        raise DataError(f"{path}: must be an object with one object a place; get it from {SOURCE}")
    return places


def _images(path: Path, root: Path, name: str, place: dict[str, Any]) -> list[_Image]:
    """The images of a place by ascending date; passes of one day by the time in their names."""
    folder = inside(root, str(place.get("folder", name)), path)
    images = []
    for key, described in place.items():
        if not key.isdigit():
            continue
        where = f"{path}: image {key} of place {name}"
        try:
            date = parse_date(described["date"])
            flooded, file = described["FLOODING"], described["filename"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: must have date, FLOODING and filename ({error!r})") from None
        if not isinstance(flooded, bool) or not isinstance(file, str):
            raise DataError(f"{where}: FLOODING must be true or false, filename a text")
        images.append(_Image(date, inside(folder, file, path), flooded))
    images.sort(key=lambda image: (image.date, image.prefix.name))
    for first, second in zip(images, images[1:]):
        if first.prefix == second.prefix:
            raise DataError(f"{path}: place {name} lists {first.prefix.name} twice; keep one")
    if not images:
        raise DataError(f"{path}: place {name} lists no image; fetch the list again")
    return images


def _box(path: Path, name: str, place: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """(west, south, east, north) of the polygon `geo` of a place, None where it has none."""
    if "geo" not in place:
        return None
    try:
        ring = np.array(place["geo"]["coordinates"][0], np.float64)
        (west, south), (east, north) = ring.min(0), ring.max(0)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path}: geo of place {name} must be a polygon ({error!r})") from None
    return west, south, east, north


def _onto(frame: np.ndarray, held: np.ndarray, own, grid, size) -> tuple[np.ndarray, np.ndarray]:
    """The nearest pixels of a frame (C, H, W) and its usable (H, W) on another grid."""
    from rasterio.transform import Affine
    from rasterio.warp import Resampling, reproject

    stacked = np.concatenate([frame, held[None].astype(frame.dtype)])
    moved = np.zeros((len(stacked), *size), frame.dtype)
    reproject(
        stacked, moved, src_crs=own[0], dst_crs=grid[0], src_transform=Affine(*own[1]),
        dst_transform=Affine(*grid[1]), resampling=Resampling.nearest,
    )  # fmt: skip
    return moved[:-1], moved[-1] > 0


def _averaged(image: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means of the valid pixels, float32 (T, C, size, size); valid where there was any."""
    share = F.interpolate(valid[:, None].float(), size=(size, size), mode="area")
    total = F.interpolate(image.float() * valid[:, None], size=(size, size), mode="area")
    return total / share.where(share > 0, 1.0), share[:, 0] > 0
