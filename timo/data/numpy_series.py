"""NumPy arrays with a list of dates as a dataset."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from timo.data.contract import DataError, per_band, select_bands
from timo.data.dates import order_of, read_dates, to_days
from timo.data.series import Labels, Series, WindowedSeries, sample_folders, tensor_dtype

_DATES = ("dates.json", "dates.csv", "dates.txt")
_WHAT = f"series.npy with {' or '.join(_DATES)}"


class NumpySeries(WindowedSeries):
    """Array of frames with a file of dates, or folder of folders with such, as a dataset.

    `path` is an `.npy` file, or a folder with `series.npy`, or a folder of such folders. Beside
    the array lie the files named by `dates`, `valid` and `mask`; by default `dates.json`, `.csv`
    or `.txt`, and `valid.npy` and `mask.npy` where they exist. Frames come out in ascending order
    of date whatever their order on disk, and validity and masks with them.

    `labels.csv` in the folder gives classes of series or of dates (`timo.data.labels`).
    `config.json` there, as `timo data simulate` writes it, states bands, units, scale and
    offset where the arguments do not, and `classes`, the names of the labels in their order (empty
    without such a file, or with `labels`).

    Args:
        path: array or folder; `samples` names the subfolders to use (None: all).
        dates: file with one date for each frame, in the order of the array.
        valid: file (T, H, W[, 1]) or (T,); a pixel is unusable where it equals `invalid_where`.
        mask: labels (H, W[, 1]), or (T, H, W[, 1]) for each frame.
        invalid_where: 0 for validity (True or 1 = usable), 1 for a cloud mask (1 = cloud).
        layout: "TCHW", "THWC" or "auto": bands are on the axis that leaves the height and width
            of `valid` or `mask`, or has as many entries as `bands`, or is the shortest.
        bands: names of the array's bands in order; None for those of config.json, or band1,
            band2, ...
        select: names of the bands to give out, in that order; None for all.
        nodata: value without data: pixels that have it in a selected band are not valid, and it
            becomes 0.
        units, scale, offset: physical = raw * scale + offset, one number or one for each selected
            band; None for those of config.json, or "DN", 1 and 0.
        tile, stride, region, min_valid, labels, ignore_label, cache: as in WindowedSeries.

    Raises:
        DataError: naming the file, for what cannot be read or does not fit together.
    """

    def __init__(
        self,
        path: str | Path,
        dates: str | None = None,
        valid: str | None = None,
        mask: str | None = None,
        invalid_where: int = 0,
        layout: str = "auto",
        bands: Sequence[str] | None = None,
        select: Sequence[str] | None = None,
        units: str | None = None,
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
        nodata: float | None = None,
    ):
        if layout not in ("auto", "TCHW", "THWC"):
            raise ValueError(f'layout: must be "TCHW", "THWC" or "auto", got {layout!r}')
        path = Path(path)
        stated: dict = {}
        if path.suffix == ".npy":
            arrays = [path]
        else:
            folders = sample_folders(path, samples, holds_array, _WHAT)
            arrays = [folder / "series.npy" for folder in folders]
            stated = _described(path / "config.json")
        bands = stated.get("bands") if bands is None else bands
        self.invalid_where, self._nodata = invalid_where, nodata
        self.nodata = nodata if nodata == nodata else None  # not NaN
        self._sources = [_Source(array, dates, valid, mask, layout, bands) for array in arrays]
        first = self._sources[0]
        for source in self._sources[1:]:
            if (source.count, source.dtype) != (first.count, first.dtype):
                raise DataError(
                    f"{source.path}: has {source.count} bands of {source.dtype}, {first.path} has "
                    f"{first.count} of {first.dtype}; all series of a dataset must agree"
                )
        if nodata is not None and first.dtype.kind == "u" and not np.isnan(nodata):
            if not 0 <= nodata <= np.iinfo(first.dtype).max or nodata != int(nodata):
                raise ValueError(
                    f"nodata: is {nodata}, which pixels of {first.dtype} never are; give a value "
                    f"in 0 ... {np.iinfo(first.dtype).max}, or leave it out"
                )
        if stated and len(stated["bands"]) != first.count:
            raise DataError(
                f"{path / 'config.json'}: describes the bands {stated['bands']}, {first.path} has "
                f"{first.count}; mend the file or remove it"
            )
        held = list(bands) if bands else [f"band{i + 1}" for i in range(first.count)]
        self._positions = select_bands(held, select)
        self.classes = () if labels else stated.get("classes", ())
        if scale is None:
            scale = stated["scale"][self._positions].tolist() if stated else 1.0
        if offset is None:
            offset = stated["offset"][self._positions].tolist() if stated else 0.0
        super().__init__(
            None if path.suffix == ".npy" else path,
            [source.series() for source in self._sources],
            tile, stride, region, min_valid, labels, ignore_label, cache,
            bands=[held[i] for i in self._positions],
            units=units or stated.get("units", "DN"), scale=scale, offset=offset,
        )  # fmt: skip

    def _read(self, number, row, col, h, w):
        source = self._sources[number]
        box = np.s_[:, row : row + h, col : col + w]
        frames = load_array(source.path)
        frames = np.moveaxis(frames, -1, 1) if source.layout == "THWC" else frames
        image = frames[(box[0], slice(None), *box[1:])][source.order][:, self._positions]
        valid = np.ones((len(image), h, w), bool)
        if self._nodata is not None:
            held = np.isnan(image) if np.isnan(self._nodata) else image == self._nodata
            valid &= ~held.any(1)
            image = np.where(held, np.zeros((), image.dtype), image)
        if source.valid is not None:
            flags = _without_last(load_array(source.valid), source.whole)
            flags = flags[box] if flags.ndim == 3 else flags[:, None, None]
            valid &= flags[source.order] != self.invalid_where
        mask = None
        if source.mask is not None:
            mask = _without_last(load_array(source.mask), source.whole)
            mask = mask[box][source.order] if mask.ndim == 3 else np.array(mask[box[1:]])
        return image, valid, mask


class _Source:
    """The files of one series, checked against one another."""

    def __init__(self, path: Path, dates, valid, mask, layout: str, bands):
        self.path = path
        frames = load_array(path)
        if frames.ndim != 4 or 0 in frames.shape:
            raise DataError(
                f"{path}: must be (T, C, H, W) or (T, H, W, C) with nothing empty, has shape "
                f"{frames.shape}; a single band needs its own axis: array[:, None]"
            )
        try:
            self.dtype = tensor_dtype(frames.dtype)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        self.valid = _beside(path, valid, ("valid.npy",))
        self.mask = _beside(path, mask, ("mask.npy",))
        self.layout = self._layout(frames.shape, layout, bands)
        t = frames.shape[0]
        self.count = frames.shape[1 if self.layout == "TCHW" else 3]
        self.size = frames.shape[2:] if self.layout == "TCHW" else frames.shape[1:3]
        if bands is not None and len(bands) != self.count:
            raise DataError(
                f"bands: must name all {self.count} bands of {path} (shape {frames.shape} as "
                f"{self.layout}) in order, got {bands}; select= picks some of them"
            )
        dates_path = _beside(path, dates, _DATES)
        if dates_path is None:
            raise DataError(
                f"{path}: no {' or '.join(_DATES)} lies beside it; name the file with dates="
            )
        read = read_dates(dates_path)
        if len(read) != t:
            raise DataError(
                f"{dates_path}: lists {len(read)} dates, {path} has {t} frames (shape "
                f"{frames.shape}); one date for each frame is needed"
            )
        self.order = order_of(read, [f"{dates_path} entry {i + 1}" for i in range(t)])
        self.dates = [read[i] for i in self.order]
        h, w = self.size
        self.whole = t, h, w
        for file, shapes in ((self.valid, [(t, h, w), (t,)]), (self.mask, [(h, w), (t, h, w)])):
            if file is not None:
                held = _without_last(load_array(file), self.whole)
                if held.shape not in shapes or held.dtype.kind not in "biu":
                    raise DataError(
                        f"{file}: must be integers or bool of shape {shapes[0]} or {shapes[1]} "
                        f"(one more axis of 1 at the end is fine) to go with {path}, got "
                        f"{held.dtype} {held.shape}"
                    )

    def series(self) -> Series:
        path = Path(os.path.abspath(self.path))  # of "." too, but through no link
        name = path.parent.name if path.name == "series.npy" else path.stem
        return Series(name, to_days(self.dates), *self.size)

    def _layout(self, shape: tuple[int, ...], layout: str, bands: Sequence[str] | None) -> str:
        if layout != "auto":
            return layout
        _, a, b, c = shape
        spatial = [
            _without_last(load_array(file)).shape[-2:]
            for file in (self.valid, self.mask)
            if file is not None and load_array(file).ndim > 1
        ]
        clues = [  # each says whether TCHW and whether THWC is possible; the first decisive wins
            ((b, c) in spatial, (a, b) in spatial),
            (bands is not None and len(bands) == a, bands is not None and len(bands) == c),
            (a < min(b, c), c < min(a, b)),
        ]
        for first, last in clues:
            if first != last:
                return "TCHW" if first else "THWC"
        raise DataError(
            f"{self.path}: shape {shape} does not tell which axis holds the bands; state "
            'layout="TCHW" or layout="THWC"'
        )


def load_array(path: Path) -> np.ndarray:
    """The array in an `.npy` file, memory-mapped; DataError naming the file for any other."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # refuses objects, so reads no pickle
    except Exception as error:  # a damaged header fails in many ways
        raise DataError(
            f"{path}: cannot be read as a plain NumPy array ({error}); it must be a complete .npy "
            "file of numbers: np.save(path, np.asarray(array, np.float32)), no objects"
        ) from None


def holds_array(folder: Path) -> bool:
    """Whether a series of arrays lies in the folder itself."""
    return (folder / "series.npy").exists()


def _described(path: Path) -> dict:
    """Bands, units, scale and offset (C,), and classes that a file states; {} where it does not."""
    if not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(stated, dict) or not {"bands", "units", "scale", "offset"} <= set(stated):
            return {}  # a file of another program
        bands = tuple(map(str, stated["bands"]))
        return {
            "bands": bands,
            "units": str(stated["units"]),
            "scale": per_band("scale", stated["scale"], bands),
            "offset": per_band("offset", stated["offset"], bands),
            "classes": tuple(map(str, stated.get("classes", ()))),
        }
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{path}: must be JSON with bands, units, scale and offset, as timo data simulate "
            f"writes it ({error}); mend the file or remove it"
        ) from None


def _beside(path: Path, name: str | None, defaults: Sequence[str]) -> Path | None:
    """File `name` in the folder of `path`; without a name the first default that exists."""
    if name is None:
        return next((path.parent / d for d in defaults if (path.parent / d).exists()), None)
    if not (path.parent / name).exists():
        raise DataError(f"{path.parent / name}: does not exist; it must lie beside {path.name}")
    return path.parent / name


def _without_last(array: np.ndarray, whole: tuple[int, ...] | None = None) -> np.ndarray:
    """`array` without a last axis of 1 that follows height and width; as it is if of `whole`."""
    extra = array.ndim > 2 and array.shape[-1] == 1 and array.shape != whole
    return array[..., 0] if extra else array
