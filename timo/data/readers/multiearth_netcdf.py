"""MultiEarth in NetCDF, read by GDAL's driver, which rasterio's wheels carry."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from timo.data.contract import DataError
from timo.data.windows import import_rasterio, open_raster

_DAYS_SINCE = re.compile(r"days since (\d{4}-\d\d-\d\d)(?: 00:00:00.*)?")
_REMEDY = "Get it again, or use the TIFF files"


def netcdf_layers(path: Path, sources: Sequence[str]) -> tuple[str, dict]:
    """What a file holds, and {(lon, lat, day, band): number of the layer, from 1} of its images.

    Empty where that is none of `sources`, as "Sentinel2" and "Deforestation". Places are named as
    in the names of TIFF files; the band of a label is "".
    """
    with _open(path) as file:
        # The files write Sentinel-2 where the names of TIFF files have Sentinel2.
        source = re.sub(r"\W", "", file.tags().get("NC_GLOBAL#data_source", ""))
    if source not in sources:
        return source, {}
    with _open(path, "images") as file:
        count, tags = file.count, file.tags()
    with _open(path, "center_lat_lons") as file:
        places = file.read(1)
    with _open(path, "collection_dates") as file:
        days, since = file.read(1).ravel(), _DAYS_SINCE.fullmatch(file.tags(1).get("units", ""))
    # Layers run over the dimensions before rows and columns, the last fastest; `channel` is 1.
    dimensions = tags.get("NETCDF_DIM_EXTRA", "").strip("{}").split(",")
    bands = tags.get("NETCDF_DIM_data_band_VALUES", "").strip("{}").split(",")
    by_band = "data_band" in dimensions
    if dimensions[: 1 + by_band] != ["index", "data_band"][: 1 + by_band]:
        raise DataError(f"{path}: images are by {dimensions}, not index and data_band. {_REMEDY}")
    found = count // len(bands)
    if places.shape != (found, 2) or days.shape != (found,) or not since:
        raise DataError(
            f"{path}: has {count} images of {len(bands)} bands, center_lat_lons {places.shape}, "
            f"collection_dates {days.shape} in {since and since[0]!r}; the latter must be (n, 2) "
            f"and (n,) in days since a date. {_REMEDY}"
        )
    start = int(np.datetime64(since[1]).astype(np.int64))
    layers = {}
    for number in range(count):
        (lat, lon), day = places[number // len(bands)], days[number // len(bands)]
        key = f"{lon:.2f}", f"{lat:.2f}", start + int(day), bands[number % len(bands)]
        if key in layers:
            raise DataError(f"{path}: holds {key} twice. {_REMEDY}")
        layers[key] = number + 1
    return source, layers


def read_netcdf(path: Path, numbers: Sequence[int], dtype: str) -> np.ndarray:
    """Layers (N, H, W) of the images of a file; DataError where they are not `dtype`."""
    with _open(path, "images") as file:
        if file.dtypes[0] != dtype:
            raise DataError(f"{path}: images are {file.dtypes[0]}; they must be {dtype}. {_REMEDY}")
        return file.read(list(numbers))


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
