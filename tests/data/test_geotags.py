"""Georeference from bytes of tags: the same as GDAL reads from each file anew."""

import struct

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from tests.data.writers import TRANSFORM
from timo.data.building import tiffs
from timo.data.building.geotags import geo_tags
from timo.data.building.tiffs import gdal_settings, read_tiff

UTM = "EPSG:32718"
OWN = (
    'PROJCS["own",GEOGCS["own",DATUM["own",SPHEROID["own",6378000,298]],PRIMEM["Greenwich",0],'
    'UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",1.25],PARAMETER["central_meridian",7.5],'
    'PARAMETER["scale_factor",0.999],PARAMETER["false_easting",3],PARAMETER["false_northing",5],'
    'UNIT["metre",1]]'
)
FILES = {
    "usual": (UTM, TRANSFORM, {}),
    "big": (UTM, TRANSFORM, {"BIGTIFF": "YES"}),
    "big-endian": (UTM, TRANSFORM, {"ENDIANNESS": "BIG"}),
    "rotated": (UTM, TRANSFORM @ Affine.rotation(30), {}),
    "own CRS": (OWN, TRANSFORM, {}),
    "no CRS": (None, TRANSFORM, {}),
    "nothing": (None, Affine.identity(), {}),
}


def write(path, name: str, point: bool = False):
    crs, transform, options = FILES[name]
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=2, width=3, dtype="uint8", crs=crs,
        transform=transform, **options,
    ) as file:  # fmt: skip
        if point:
            file.update_tags(AREA_OR_POINT="Point")
        file.write(np.ones((1, 2, 3), np.uint8))
    return path


def by_gdal(path):
    """(CRS, transform), or None where GDAL cannot read the file."""
    try:
        with gdal_settings(), rasterio.open(path, driver="GTiff") as file:
            file.read()
            return file.crs.to_string() if file.crs else "", tuple(file.transform)[:6]
    except rasterio.errors.RasterioError:
        return None


def ours(path):
    try:
        with gdal_settings():
            grid = read_tiff(path, [1], None, 3)[1]
    except tiffs.Unfit:
        return None
    return grid.crs, grid.transform


@pytest.mark.filterwarnings("ignore:The given matrix is equal")
@pytest.mark.parametrize("name", FILES)
def test_no_changed_byte_goes_unnoticed(tmp_path, name, monkeypatch):
    whole = write(tmp_path / "whole.tif", name).read_bytes()
    assert geo_tags(tmp_path / "whole.tif") is not None
    monkeypatch.setattr(tiffs, "_KNOWN", {})
    expected = ours(tmp_path / "whole.tif")
    assert expected == by_gdal(tmp_path / "whole.tif")
    path, others = tmp_path / "changed.tif", 0
    places = range(len(whole))
    if name == "own CRS":  # GDAL takes long for one
        numbers, text = whole.index(struct.pack("<d", 7.5)), whole.index(b"own")
        places = [*range(numbers, numbers + 8), *range(text, text + 3)]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        changed = by_gdal(path)
        assert ours(path) == changed, at
        others += changed not in (expected, None)
    assert others >= 2


@pytest.mark.filterwarnings("ignore:The given matrix is equal")
def test_files_of_each_kind_in_turn(tmp_path):
    """What is known of one file is not given out for another."""
    for name in FILES:
        for point in (False, True):
            path = write(tmp_path / f"{name}{point}.tif", name, point)
            for _ in range(2):
                assert ours(path) == by_gdal(path)
    with gdal_settings(), tiffs.open_tiff(tmp_path / "usualTrue.tif") as file:
        assert file.crs is None  # else nothing is known from tags


def test_no_tiff_has_no_tags(tmp_path):
    path = tmp_path / "a.tif"
    assert geo_tags(path) is None
    for content in (b"", b"II*\0", b"no raster", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\0\0\0"):
        path.write_bytes(content)
        assert geo_tags(path) is None
