"""Open a path as the dataset that it holds."""

from pathlib import Path

from timo.data.contract import DataError
from timo.data.numpy_series import NumpySeries
from timo.data.rasters import RasterSeries


def open_series(path: str | Path, **options) -> RasterSeries | NumpySeries:
    """RasterSeries or NumpySeries, by what `path` (a folder, or an `.npy` file) holds.

    `options` go to the class. Raises DataError where `path` holds neither, or both.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return NumpySeries(path, **options)

    def holds(pattern: str) -> bool:
        return any(path.glob(pattern)) or any(path.glob(f"*/{pattern}"))

    arrays, rasters = holds("series.npy"), holds("*.tif") or holds("*.tiff")
    if arrays == rasters:
        raise DataError(
            f"{path}: holds {'both' if arrays else 'neither'} rasters named "
            f"<date>[_<anything>].tif {'and' if arrays else 'nor'} series.npy with dates.json, in "
            "it or in its folders; give the folder of one of them, or the path of an .npy file "
            "with dates="
        )
    return (NumpySeries if arrays else RasterSeries)(path, **options)
