"""MultiSenGE: land cover of Grand-Est, France, from Sentinel-2 in 2020."""

import hashlib
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
    read_json,
    read_raster,
)
from timo.data.transforms import sample_generator

SOURCE = "https://doi.org/10.5281/zenodo.6375466"
BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12")
CLASSES = (
    "dense built-up", "sparse built-up", "specialised built-up", "specialised vegetative",
    "networks", "arable", "vineyard", "orchard", "grassland", "groves and hedges", "forest",
    "open mineral", "wetland", "water",
)  # fmt: skip
TILES = {"train": slice(0, 8), "val": slice(8, 11), "test": slice(11, 14)}
PUBLISHED_FRAMES = 3
MAJA_NODATA = -10_000

_NAME = re.compile(r"(?P<tile>\d{2}[A-Z]{3})_(?P<x>\d+)_(?P<y>\d+)")
_LABELS = {0: IGNORE_INDEX} | {number: number - 1 for number in range(1, len(CLASSES) + 1)}


class MultiSenGE(PublishedSeries):
    """Patches of 256 x 256 pixels at 10 m, 2 to 23 dates of 2020, 14 classes of land cover.

    Layout: `labels/<tile>_<x>_<y>.json` lists the acquisitions of a patch (`corresponding_s2`, in
    any order), `s2/<tile>_<date>_S2_<x>_<y>.tif` holds ten bands, reflectance = DN / 10000
    (processed by MAJA, so without the offset of ESA's processing baseline 04.00),
    `ground_reference/<tile>_GR_<x>_<y>.tif` the labels 1 ... 14, which become 0 ... 13; 0 is not
    labelled and becomes 255. A pixel is invalid where a band is nodata (by the
    file's tag, or -10000) or all bands are 0.

    Args:
        root: folder that holds labels, s2 and ground_reference.
        split: "train", "val" or "test": the first 8, the next 3 and the last 3 of the 14 tiles
            sorted by name; "all".
        tiles: use these tiles in place of the split's, as for a copy that holds a few of them.
        select: names of the bands to give out, in that order; None for all of `BANDS`.
        incomplete: "error", or "skip" to leave out patches that lack a file, with a warning.
        protocol: "published" draws three frames of a patch with replacement, the same in every
            epoch, as the published experiments did; "sound" gives all frames. Either way frames
            come in ascending order of date.

    Raises:
        DataError: naming the file, for what is missing or not as published.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        tiles: Sequence[str] | None = None,
        select: Sequence[str] | None = None,
        incomplete: str = "error",
        protocol: str = "sound",
    ):
        choose("split", split, (*SPLITS, "all"))
        choose("incomplete", incomplete, INCOMPLETE)
        self.protocol = choose("protocol", protocol, ("sound", "published"))
        root = need_folder(root, "labels, s2 and ground_reference", SOURCE)
        held = set()
        for folder in ("labels", "s2", "ground_reference"):
            held |= set(need_folder(root / folder, f"the {folder} files", SOURCE).iterdir())
        described = sorted(p for p in held if p.suffix == ".json" and p.parent.name == "labels")
        tile_of = {path: _name_of(path)["tile"] for path in described}
        chosen = _tiles(root, sorted(set(tile_of.values())), split, tiles)
        self._patches, lacking, total = {}, [], 0
        described = [path for path in described if tile_of[path] in chosen]
        for path in with_progress(described, "labels"):
            patch = _Patch(root, path)
            missing = [file for file in (*patch.images, patch.mask) if file not in held]
            lacking, total = lacking + missing, total + len(patch.images) + 1
            if not missing:
                self._patches[path.stem] = patch
        need_files(lacking, total, "files named by labels/*.json", SOURCE, incomplete)
        self._positions = select_bands(BANDS, select)
        super().__init__(
            root, split, self._patches, CLASSES,
            bands=[BANDS[i] for i in self._positions], units="reflectance", scale=1e-4,
        )  # fmt: skip

    def _length(self, name: str) -> int:
        return PUBLISHED_FRAMES if self.protocol == "published" else len(self._patches[name].days)

    def _sample(self, name: str) -> dict:
        patch = self._patches[name]
        labels, _, grid = read_raster(patch.mask, 1, "uint8")
        frames, usable = [], []
        for path in patch.images:
            dtypes = ("uint16", "int16")
            frame, held, _ = read_raster(path, len(BANDS), dtypes, labels.shape[1:], grid)
            frames.append(frame[self._positions])
            usable.append(held.all(0) & (frame != 0).any(0) & (frame.min(0) > MAJA_NODATA))
        image, valid = clean(_stack(frames, patch.images), np.stack(usable))
        dates = torch.from_numpy(patch.days)
        if self.protocol == "published":
            kept = _drawn(name, len(dates))
            image, valid, dates = image[kept], valid[kept], dates[kept]
        mask = map_labels(labels[0], _LABELS, patch.mask)
        return {"image": image, "dates": dates, "valid": valid, "mask": mask}


class _Patch:
    """Files of one patch, by ascending date: `images`, `days` int64 (T,), `mask`."""

    def __init__(self, root: Path, path: Path):
        name, described = _name_of(path), read_json(path)
        listed = described.get("corresponding_s2") if isinstance(described, dict) else None
        if not isinstance(listed, str) or not listed.strip("; "):
            raise DataError(
                f"{path}: must name the acquisitions in 'corresponding_s2', separated by ';', got "
                f"{listed!r}; fetch it again from {SOURCE}"
            )
        files = [text.strip() for text in listed.split(";") if text.strip()]
        form = re.compile(rf"{name['tile']}_(\d{{8}})_S2_{name['x']}_{name['y']}\.tif")
        dates = []
        for file in files:
            match = form.fullmatch(inside(root / "s2", file, path).name)
            try:
                dates.append(parse_date(match[1] if match else file))
            except ValueError as error:
                raise DataError(
                    f"{path}: names {file!r}, which is no acquisition of this patch, "
                    f"<tile>_<YYYYMMDD>_S2_<x>_<y>.tif ({error}); fetch it again from {SOURCE}"
                ) from None
        order = order_of(dates, [f"{path}: {file}" for file in files])
        self.images = [root / "s2" / files[i] for i in order]
        self.days = to_days([dates[i] for i in order])
        self.mask = root / "ground_reference" / f"{name['tile']}_GR_{name['x']}_{name['y']}.tif"


def _name_of(path: Path) -> re.Match:
    match = _NAME.fullmatch(path.stem)
    if not match:
        raise DataError(f"{path}: must be named <tile>_<x>_<y>.json, as 31UGQ_1028_257.json")
    return match


def _tiles(root: Path, held: list[str], split: str, tiles: Sequence[str] | None) -> set[str]:
    """The tiles to use; the rule of the split holds for the complete data set only."""
    if tiles is not None:
        absent = sorted(set(tiles) - set(held))
        if absent:
            raise DataError(f"tiles: {root} holds no {', '.join(absent)}; it holds {held}")
        return set(tiles)
    if split == "all":
        return set(held)
    if len(held) != 14:
        raise DataError(
            f"{root}: holds patches of {len(held)} tiles, {', '.join(held)}; the split is a rule "
            f"over all 14 (8 train, 3 val, 3 test by name). Get the rest from {SOURCE}, or state "
            "tiles="
        )
    return set(held[TILES[split]])


def _stack(frames: list[np.ndarray], paths: list[Path]) -> np.ndarray:
    for frame, path in zip(frames, paths):
        if frame.dtype != frames[0].dtype:
            raise DataError(
                f"{path}: holds {frame.dtype}, {paths[0]} holds {frames[0].dtype}; all dates of a "
                "patch must agree: fetch them again"
            )
    return np.stack(frames)


def _drawn(name: str, count: int) -> torch.Tensor:
    """Positions of `PUBLISHED_FRAMES` frames, drawn with replacement, ascending."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = sample_generator(seed, 0, 0)
    return torch.randint(count, (PUBLISHED_FRAMES,), generator=generator).sort().values
