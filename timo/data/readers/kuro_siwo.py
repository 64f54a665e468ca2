"""Kuro Siwo: flood mapping in Sentinel-1 series (Bountos et al., arXiv 2311.12056)."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timo.data.contract import DataError, with_progress
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
    read_json,
    read_raster,
)

SOURCE = "https://github.com/Orion-AI-Lab/KuroSiwo"
CLASSES = ("no water", "permanent water", "flood")
# The activations of each part as the authors publish them (configs/train/data_config.json).
ACTIVATIONS = {
    "train": (
        118, 130, 147, 174, 267, 273, 275, 324, 417, 421, 427, 470, 492, 496, 497, 498, 502, 518,
        554, 555, 567, 1111004, 1111005, 1111006, 1111009, 1111010, 1111011,
    ),
    "val": (279, 437, 514, 520, 559, 1111003, 1111008),
    "test": (205, 277, 321, 411, 445, 561, 562, 1111002, 1111007, 1111013),
}  # fmt: skip
_LABELS = {0: 0, 1: 1, 2: 2, 3: 255}  # 3: no data
_ROLES = ("SL2", "SL1", "MS1")  # second last and last pass before the flood, pass during it
_BANDS = {"VV": "IVV", "VH": "IVH"}
_UNLABELLED = "00"  # area of interest that holds the grids without labels
_CLAMP, _MEAN, _DEVIATION = 0.15, (0.0953, 0.0264), (0.0427, 0.0215)


class KuroSiwo(PublishedSeries):
    """Grids of 224 x 224 pixels at 10 m, two passes of Sentinel-1 before a flood and one during it.

    Layout: `<root>/<activation>/<area>/<grid>/` with `{SL2,SL1,MS1}_{IVV,IVH}_*_<date>.tif`
    (float32, linear backscatter, 0 = no data), `MK0_MLU_*.tif` (labels), `MK0_MNA_*.tif` (1 =
    usable). Grids without labels lie in `<activation>/00/<two characters>/<grid>/`.

    Samples: `image` float32 (T, 2, H, W), T = 3 (2 where only one earlier pass exists) in the
    order of their dates, `mask` int64 (H, W): 0 no water, 1 permanent water, 2 flood, 255 unknown.

    Args:
        root: folder of the activations.
        split: "train", "val" or "test": 27, 7 and 10 activations, those that the authors publish;
            "all" for every activation in `root`.
        labelled: False for the grids without labels, which have no `mask`: for pretraining.
        activations: those to use in place of the split's.
        incomplete: "error", or "skip" to leave out, with a warning, activations and grids that a
            copy lacks.
        clamp: largest backscatter, as the authors of the data cut it off; None for all values.
        protocol: "sound", or "published" for the scaling behind TiMo's published number: each
            image to its own 0 ... 1, pixels without data among them, all of them valid. It erases
            the radiometry. Its parts depended on the order of a directory listing and cannot be
            had again; those of `split` are used.

    Raises:
        DataError: naming the activations, folders or files that are missing or wrong.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        labelled: bool = True,
        activations: Sequence[int] | None = None,
        incomplete: str = "error",
        clamp: float | None = _CLAMP,
        protocol: str = "sound",
    ):
        root = need_folder(root, "a folder for each activation", SOURCE)
        choose("split", split, (*SPLITS, "all"))
        choose("incomplete", incomplete, INCOMPLETE)
        self.protocol = choose("protocol", protocol, ("sound", "published"))
        if clamp is not None and clamp <= 0:
            raise ValueError(f"clamp: must be above 0, got {clamp}")
        self.labelled, self.clamp = labelled, clamp
        if activations is None:
            held = [int(folder.name) for folder in _folders(root) if folder.name.isdigit()]
            activations = held if split == "all" else ACTIVATIONS[split]
        wanted = [root / str(act) for act in sorted(activations)]
        lacking = [folder for folder in wanted if not folder.is_dir()]
        need_files(lacking, len(wanted), f"activations of split {split!r}", SOURCE, incomplete)
        grids = [grid for act in wanted if act not in lacking for grid in _grids(act, labelled)]
        self._passes, lacking, total = {}, [], 0
        for grid in with_progress(grids, "grids"):
            needed = self._needed(grid)
            missing = [path for path in needed if not path.is_file()]
            lacking, total = lacking + missing, total + len(needed)
            if not missing:
                passes = (len(needed) - 1 - labelled) // len(_BANDS)
                self._passes[grid.relative_to(root).as_posix()] = passes
        need_files(lacking, total, "files of the grids", SOURCE, incomplete)
        super().__init__(
            root, split, self._passes, CLASSES,
            bands=tuple(_BANDS), units="linear" if protocol == "sound" else "share of the range",
        )  # fmt: skip

    def statistics(self, max_samples: int = 256) -> tuple[Tensor, Tensor]:
        """Those that the authors state for their clamped training part; else as measured."""
        if self.protocol == "sound" and self.clamp == _CLAMP:
            return torch.tensor(_MEAN), torch.tensor(_DEVIATION)
        return super().statistics(max_samples)

    def _needed(self, folder: Path) -> list[Path]:
        """The files of a grid; those that are missing by the pattern of their names."""
        files = _files(folder)
        keys = [(role, band) for role in _ROLES for band in _BANDS.values()] + [("MK0", "MNA")]
        if self.labelled:
            keys.append(("MK0", "MLU"))
        if ("SL2", "IVV") not in files and ("SL2", "IVH") not in files and _one_pass(folder):
            keys = keys[len(_BANDS) :]
        return [files.get(key, folder / "{}_{}_*.tif".format(*key)) for key in keys]

    def _length(self, name: str) -> int:
        return self._passes[name]

    def _sample(self, name: str) -> dict:
        folder = self.root / name
        files = _files(folder)
        needed = self._needed(folder)
        missing = [path for path in needed if not path.is_file()]
        need_files(missing, len(needed), "files of the grid", SOURCE)
        usable, _, grid = read_raster(
            files["MK0", "MNA"], 1, ("uint8", "uint16", "int16", "float32")
        )
        size = usable.shape[1:]
        days, images, valids = [], [], []
        for role in _ROLES:
            if (role, "IVV") not in files:
                continue
            paths = [files[role, band] for band in _BANDS.values()]
            days.append(_day(paths))
            read = [read_raster(path, 1, "float32", size, grid) for path in paths]
            images.append(np.concatenate([pixels for pixels, _, _ in read]))
            valids.append(np.concatenate([held & (pixels != 0) for pixels, held, _ in read]))
        if sorted(set(days)) != days:
            raise DataError(
                f"{folder}: its passes {', '.join(_ROLES[-len(days) :])} are dated "
                f"{', '.join(map(str, days))}, but must follow one another; fetch the grid again"
            )
        image, valid = clean(np.stack(images), np.stack(valids) & (usable == 1))
        if self.protocol == "published":
            low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
            image = (image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)
            valid = torch.ones_like(valid)
        elif self.clamp is not None:
            image = image.clamp(0, self.clamp)
        sample = {"image": image, "dates": torch.from_numpy(to_days(days)), "valid": valid}
        if self.labelled:
            path = files["MK0", "MLU"]
            labels, _, _ = read_raster(path, 1, "uint8", size, grid)
            sample["mask"] = map_labels(labels[0], _LABELS, path)
        return sample


def _grids(activation: Path, labelled: bool) -> list[Path]:
    """Folders of the grids of an activation, in ascending order."""
    areas = [area for area in _folders(activation) if (area.name != _UNLABELLED) == labelled]
    if not labelled:
        areas = [shard for area in areas for shard in _folders(area)]
    return [grid for area in areas for grid in _folders(area)]


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> dict[tuple[str, str], Path]:
    """{("MS1", "IVV"): path, ...} of the files in the folder of a grid."""
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*.tif")):
        match = re.fullmatch(r"(MS1|SL1|SL2|MK0)_([A-Z]+)_\d+_(?:\d+|NA)_\d{8}", path.stem)
        if match is None:
            continue
        key = (match[1], match[2])
        if key in files:
            raise DataError(
                f"{path}: {files[key].name} is {key[0]}_{key[1]} of the same grid; keep the one "
                f"that {folder / 'info.json'} lists"
            )
        files[key] = path
    return files


def _one_pass(folder: Path) -> bool:
    """Whether the grid has, by its description, one pass before the flood only."""
    path = folder / "info.json"
    described = read_json(path) if path.is_file() else {}
    return isinstance(described, dict) and described.get("slavecov") == 1


def _day(paths: Sequence[Path]) -> np.datetime64:
    """The date in the names of the bands of one pass."""
    stamps = {path.stem[-8:] for path in paths}
    try:
        (stamp,) = stamps
        return parse_date(stamp)
    except ValueError:
        raise DataError(
            f"{paths[0]}: the names of its pass state the dates {', '.join(sorted(stamps))}; they "
            "must be one day, as YYYYMMDD; fetch the grid again"
        ) from None
