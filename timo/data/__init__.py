"""Datasets of satellite image time series; see `timo.data.contract` for what a sample is.

Rasters need rasterio (`pip install timo[geo]`) from the moment that one is opened; importing does
not.
"""

from typing import TYPE_CHECKING

from timo.data.augmentation import BandDropout, RandomClouds, RandomResizedCrop
from timo.data.check import CheckReport, check_dataset
from timo.data.collate import collate_series
from timo.data.contract import (
    IGNORE_INDEX,
    DataError,
    SeriesDataset,
    physical,
    validate_sample,
)
from timo.data.indices import mndwi, normalized_difference, open_water
from timo.data.loading import LocationLoader
from timo.data.numpy_series import NumpySeries
from timo.data.opening import open_series
from timo.data.published import PublishedCorpus
from timo.data.rasters import RasterSeries
from timo.data.readers import READERS, open_dataset
from timo.data.store import StoreSeries
from timo.data.transforms import TemporalSubset, TransformedSeries, random_flip, random_rotate90
from timo.data.windows import GeoTiffWriter, blend, grid_windows

if TYPE_CHECKING:
    from timo.data.simulate import SimulatedSeries

__all__ = [
    "IGNORE_INDEX",
    "BandDropout",
    "CheckReport",
    "READERS",
    "DataError",
    "GeoTiffWriter",
    "LocationLoader",
    "NumpySeries",
    "PublishedCorpus",
    "RandomClouds",
    "RandomResizedCrop",
    "RasterSeries",
    "SeriesDataset",
    "SimulatedSeries",
    "StoreSeries",
    "TemporalSubset",
    "TransformedSeries",
    "blend",
    "check_dataset",
    "collate_series",
    "grid_windows",
    "mndwi",
    "normalized_difference",
    "open_dataset",
    "open_series",
    "open_water",
    "physical",
    "random_flip",
    "random_rotate90",
    "validate_sample",
]


def __getattr__(name: str):
    if name == "SimulatedSeries":
        from timo.data.simulate import SimulatedSeries

        return SimulatedSeries
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
