"""Building the pretraining store from folders of rasters, simulation or the published layout."""

from timo.data.building.builder import build_store
from timo.data.building.sources import RasterSource, SecoSource, SeriesSource, Source

__all__ = ["RasterSource", "SecoSource", "SeriesSource", "Source", "build_store"]
