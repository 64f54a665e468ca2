"""Simulated Sentinel-2 series: data for tests, demonstrations and a first run, with no download."""

from timo.data.simulate.dataset import SimulatedSeries
from timo.data.simulate.events import DEFORESTATION_CLASSES, FLOOD_CLASSES
from timo.data.simulate.landscape import LAND_COVER_CLASSES
from timo.data.simulate.spectra import CROP_CLASSES, SENTINEL2_BANDS
from timo.data.simulate.write import write_series

__all__ = [
    "CROP_CLASSES",
    "DEFORESTATION_CLASSES",
    "FLOOD_CLASSES",
    "LAND_COVER_CLASSES",
    "SENTINEL2_BANDS",
    "SimulatedSeries",
    "write_series",
]
