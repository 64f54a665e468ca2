"""PASTIS and PASTIS-R: crop types in Sentinel-2 and Sentinel-1 series of France."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timo.data.contract import DataError, select_bands
from timo.data.dates import order_of, parse_date, to_days
from timo.data.numpy_series import load_array
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
)

SOURCE = "https://zenodo.org/records/5012942 (PASTIS) or 5735646 (PASTIS-R)"
CLASSES = (
    "background", "meadow", "soft winter wheat", "corn", "winter barley", "winter rapeseed",
    "spring barley", "sunflower", "grapevine", "beet", "winter triticale", "winter durum wheat",
    "fruits, vegetables, flowers", "potatoes", "leguminous fodder", "soybeans", "orchard",
    "mixed cereal", "sorghum",
)  # fmt: skip
_LABELS = {label: label for label in range(len(CLASSES))} | {19: 255}  # 19: void
_OPTICAL = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_RADAR = ("VV", "VH", "VV/VH")
_NODATA = -10000  # of the optical product
_OFFSETS = {"train": (0, 1, 2), "val": (3,), "test": (4,), "all": (0, 1, 2, 3, 4)}


class Pastis(PublishedSeries):
    """Patches of 128 x 128 pixels at 10 m with labels of 18 crops.

    Layout: `<root>/DATA_<sensor>/<sensor>_<id>.npy` (T, C, H, W), int16 for Sentinel-2 (1e-4
    reflectance), float for Sentinel-1 (dB); `ANNOTATIONS/TARGET_<id>.npy` (3, H, W), of which
    channel 0 is the label; `metadata.geojson` with the dates and the fold of each patch.

    Samples: `image` float32 (T, C, H, W), 38 to 61 dates of Sentinel-2 in ascending order; `mask`
    int64 (H, W), 0 background, 1 ... 18 crops, 255 where the label is void.

    Args:
        root: folder of the data set.
        split: "train", "val" or "test"; "all" for all folds.
        fold: which of the five official rotations, 1 ... 5: fold k trains on the folds k, k + 1
            and k + 2, validates on k + 3 and tests on k + 4, counted around from 5 to 1. Published
            results are means over all five.
        sensor: "S2", or of PASTIS-R "S1A" (ascending orbit) or "S1D" (descending).
        select: names of the bands to give out, in that order; None for all.
        incomplete: "error", or "skip" to leave out, with a warning, patches that a copy lacks.

    Raises:
        DataError: naming the file, for what is missing, cannot be read or does not fit together.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        fold: int = 1,
        sensor: str = "S2",
        select: Sequence[str] | None = None,
        incomplete: str = "error",
    ):
        root = need_folder(root, "metadata.geojson, DATA_S2 and ANNOTATIONS", SOURCE)
        choose("split", split, (*SPLITS, "all"))
        choose("incomplete", incomplete, INCOMPLETE)
        self.sensor = choose("sensor", sensor, ("S2", "S1A", "S1D"))
        if fold not in range(1, 6):
            raise ValueError(f"fold: must be in 1 ... 5, got {fold}")
        optical = sensor == "S2"
        self._held = _OPTICAL if optical else _RADAR
        self._positions = select_bands(self._held, select)
        self.folds = {
            part: [(fold - 1 + offset) % 5 + 1 for offset in offsets]
            for part, offsets in _OFFSETS.items()
        }
        listed = _patches(root / "metadata.geojson", sensor)
        self._dates = {
            name: dates for name, (its, dates) in listed.items() if its in self.folds[split]
        }
        total, lacking = 2 * len(self._dates), []
        for name in list(self._dates):
            array = root / f"DATA_{sensor}" / f"{sensor}_{name}.npy"
            missing = [path for path in (array, _target(root, name)) if not path.is_file()]
            lacking += missing
            if missing:
                del self._dates[name]
        need_files(lacking, total, "files of the patches", SOURCE, incomplete)
        super().__init__(
            root, split, self._dates, CLASSES,
            bands=[self._held[i] for i in self._positions],
            units="reflectance" if optical else "dB",
            scale=1e-4 if optical else 1.0,
        )  # fmt: skip

    def statistics(self, max_samples: int = 256) -> tuple[Tensor, Tensor]:
        """Means over the training folds of what `NORM_<sensor>_patch.json` states by fold.

        Measured, as in other data sets, where there is no such file.
        """
        path = self.root / f"NORM_{self.sensor}_patch.json"
        if not path.is_file():
            return super().statistics(max_samples)
        stated = read_json(path)
        try:
            means = [stated[f"Fold_{fold}"]["mean"] for fold in self.folds["train"]]
            deviations = [stated[f"Fold_{fold}"]["std"] for fold in self.folds["train"]]
            norm = torch.tensor([means, deviations], dtype=torch.float64).mean(1)  # (2, bands)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: lacks mean and std of a fold ({error!r})") from None
        if norm.shape != (2, len(self._held)) or not norm.isfinite().all():
            raise DataError(
                f"{path}: must hold {len(self._held)} finite numbers as mean and as std of each "
                f"fold, got {tuple(norm.shape[1:])}"
            )
        mean, deviation = norm[:, self._positions].float()
        return mean * self.scale + self.offset, deviation * self.scale.abs()

    def _length(self, name: str) -> int:
        return len(self._dates[name])

    def _sample(self, name: str) -> dict:
        path = self.root / f"DATA_{self.sensor}" / f"{self.sensor}_{name}.npy"
        frames = load_array(path)
        kinds = "i" if self.sensor == "S2" else "f"
        count = len(self._held)
        if frames.ndim != 4 or frames.shape[1] != count or frames.dtype.kind not in kinds:
            raise DataError(
                f"{path}: must be {'integers' if kinds == 'i' else 'floats'} (T, {count}, H, W), "
                f"got {frames.dtype} {frames.shape}; fetch the file again"
            )
        dates = self._dates[name]
        if len(dates) != len(frames) or frames.size == 0:
            raise DataError(
                f"{path}: has the shape {frames.shape}, {self.root / 'metadata.geojson'} lists "
                f"{len(dates)} dates for it; fetch both again"
            )
        order = order_of(dates, [f"{path} frame {i}" for i in range(len(dates))])
        # Whole frames are read before bands are picked: a map of the file is read in pieces.
        image = np.asarray(frames[order], np.float32)[:, self._positions]
        valid = image != _NODATA if self.sensor == "S2" else np.ones_like(image, bool)
        image, valid = clean(image, valid)
        path = _target(self.root, name)
        target = load_array(path)
        if target.ndim != 3 or target.dtype.kind not in "iu" or target[0].shape != image.shape[2:]:
            raise DataError(
                f"{path}: must be integers (3, {image.shape[2]}, {image.shape[3]}), got "
                f"{target.dtype} {target.shape}; fetch the file again"
            )
        return {
            "image": image,
            "dates": torch.from_numpy(to_days([dates[i] for i in order])),
            "valid": valid,
            "mask": map_labels(np.asarray(target[0]), _LABELS, path),
        }


def _target(root: Path, name: str) -> Path:
    return root / "ANNOTATIONS" / f"TARGET_{name}.npy"


def _patches(path: Path, sensor: str) -> dict[str, tuple[int, list[np.datetime64]]]:
    """{id: (fold, dates in file order)} of every patch that the metadata lists."""
    content = read_json(path)
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, list):
        raise DataError(f"{path}: must be a GeoJSON with a list of features; get it from {SOURCE}")
    patches: dict[str, tuple[int, list[np.datetime64]]] = {}
    for number, feature in enumerate(features):
        where = f"{path}: feature {number}"
        try:
            held = feature["properties"]
            name, fold = int(held["ID_PATCH"]), int(held["Fold"])
            listed = held[f"dates-{sensor}"]
            if isinstance(listed, str):  # geopandas writes dictionaries as text
                listed = json.loads(listed)
            dates = [parse_date(str(listed[str(i)])) for i in range(len(listed))]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: must have ID_PATCH, Fold and dates-{sensor} as "
                f'{{"0": YYYYMMDD, ...}} ({error!r}); get the file from {SOURCE}'
            ) from None
        if fold not in range(1, 6) or str(name) in patches:
            raise DataError(f"{where}: patch {name} of fold {fold} is listed twice or of no fold")
        patches[str(name)] = (fold, dates)
    return patches
