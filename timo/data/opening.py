"""Open a path as the dataset that it holds."""

from pathlib import Path

from timo.data.contract import DataError, SeriesDataset
from timo.data.numpy_series import NumpySeries
from timo.data.published import PublishedCorpus
from timo.data.rasters import RasterSeries
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

    def holds(pattern: str) -> bool:
        return any(path.glob(pattern)) or any(path.glob(f"*/{pattern}"))

    arrays, rasters = holds("series.npy"), holds("*.tif") or holds("*.tiff")
    if arrays == rasters:
        raise DataError(
            f"{path}: holds {'both' if arrays else 'neither'} rasters named "
            f"<date>[_<anything>].tif {'and' if arrays else 'nor'} series.npy with dates.json, in "
            "it or in its folders; give the folder of one of them, a store of `timo data "
            "build-pretraining`, or the path of an .npy file with dates="
        )
    return (NumpySeries if arrays else RasterSeries)(path, **options)
