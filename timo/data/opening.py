"""Open a path as the dataset that it holds."""

from pathlib import Path

from timo.data.contract import DataError, SeriesDataset
from timo.data.numpy_series import NumpySeries, holds_array
from timo.data.published import PublishedCorpus
from timo.data.rasters import RasterSeries, holds_rasters
from timo.data.series import subfolders_of
from timo.data.store import MANIFEST, StoreSeries


def open_series(path: str | Path, **options) -> SeriesDataset:
    """RasterSeries, NumpySeries, StoreSeries or PublishedCorpus, by what `path` holds.

    `path` is a folder, an `.npy` file or the CSV of the published pretraining layout; `options`
    go to the class. Raises DataError where `path` holds none of them, or rasters beside arrays.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return NumpySeries(path, **options)
    if (path / MANIFEST).exists():
        return StoreSeries(path, **options)
    if path.suffix == ".csv" or (any(path.glob("*.csv")) and any(path.glob("*[0-9].npy"))):
        return PublishedCorpus(path, **options)
    if not path.is_dir():
        raise DataError(
            f"{path}: {'is no folder' if path.exists() else 'does not exist'}; give the folder of "
            "the series, or the path of an .npy file with dates="
        )
    folders = [path, *subfolders_of(path)]
    arrays, rasters = (any(map(held, folders)) for held in (holds_array, holds_rasters))
    if arrays == rasters:
        raise DataError(
            f"{path}: holds {'both' if arrays else 'neither'} rasters named "
            f"<date>[_<anything>].tif {'and' if arrays else 'nor'} series.npy with dates.json, in "
            "it or in its folders; give the folder of one of them, a store of `timo data "
            "build-pretraining`, or the path of an .npy file with dates="
        )
    return (NumpySeries if arrays else RasterSeries)(path, **options)
