"""Labels of MultiEarth in NetCDF, read by GDAL's driver, which rasterio's wheels carry."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from timo.data.contract import DataError
from timo.data.rasters import open_raster
from timo.data.windows import import_rasterio

_DAYS_SINCE = re.compile(r"days since (\d{4}-\d\d-\d\d)(?: 00:00:00.*)?")


def netcdf_labels(path: Path) -> dict[tuple[str, str, int], int]:
    """{(lon, lat, day): number of the band, from 1} of a file of deforestation labels.

    Empty for a NetCDF file of something else. Names of places are as in the names of TIFF files.
    """
    with _open(path) as file:
        if file.tags().get("NC_GLOBAL#data_source") != "Deforestation":
            return {}
    with _open(path, "images") as file:
        count = file.count
    with _open(path, "center_lat_lons") as file:
        places = file.read(1)
    with _open(path, "collection_dates") as file:
        days, since = file.read(1).ravel(), _DAYS_SINCE.fullmatch(file.tags(1).get("units", ""))
    if places.shape != (count, 2) or days.shape != (count,) or not since:
        raise DataError(
            f"{path}: has {count} images, center_lat_lons {places.shape} and collection_dates "
            f"{days.shape} in {since and since[0]!r}; it must have (n, 2) and (n,) in days since a "
            "date. Get it again, or use the TIFF files"
        )
    start = int(np.datetime64(since[1]).astype(np.int64))
    return {
        (f"{lon:.2f}", f"{lat:.2f}", start + int(day)): number
        for number, ((lat, lon), day) in enumerate(zip(places, days), 1)
    }


def read_netcdf_label(path: Path, number: int) -> np.ndarray:
    """Labels (H, W) uint8 of one image."""
    with _open(path, "images") as file:
        if file.dtypes[0] != "uint8":
            raise DataError(f"{path}: labels are {file.dtypes[0]}; they must be uint8")
        return file.read(number)


@contextmanager
def _open(path: Path, variable: str | None = None) -> Iterator:
    if '"' in str(path):
        raise DataError(f'{path}: GDAL cannot open a NetCDF file with " in its name; rename it')
    name = path if variable is None else f'netcdf:"{path}":{variable}'
    # GDAL takes a grid without coordinates for upside down and turns it; here row 0 is the top.
    with (
        import_rasterio().Env(GDAL_NETCDF_BOTTOMUP="NO"),
        open_raster(name, driver="netCDF") as file,
    ):
        yield file
