"""Stores built from folders of rasters."""

import numpy as np
import pytest
import rasterio
import torch

from tests.data.corpora import rejections, scene
from tests.data.writers import TRANSFORM, Affine, frames, write_rasters, write_tif
from timo.data import DataError, RasterSeries, StoreSeries, open_series
from timo.data.building import RasterSource, build_store


def test_raster_folders_windows_and_validity(tmp_path):
    pixels = frames(3, bands=2, height=50, width=70)
    names = ["20200105", "20200506_S2", "2020-09-07"]
    write_rasters(tmp_path / "r" / "a", names, pixels, nodata=0, descriptions=("Red", "NIR"))
    write_rasters(tmp_path / "r" / "b", names, pixels[:, :, :24, :24] + 1, nodata=0,
                  descriptions=("Red", "NIR"))  # fmt: skip
    pixels[1, 0, 25, 30] = 0  # nodata in one band
    write_tif(tmp_path / "r/a/20200506_S2.tif", pixels[1], nodata=0, descriptions=("Red", "NIR"))
    cloudy = np.ones((50, 70), "uint8")
    cloudy[30:34, 24:30] = 0
    write_tif(tmp_path / "r/a/20200105_valid.tif", cloudy)
    source = RasterSource(tmp_path / "r", 24, None)
    assert source.names() == ["a@0,0", "a@0,24", "a@24,0", "a@24,24", "b"]
    build_store(source, tmp_path / "store", dates=3)
    store = StoreSeries(tmp_path / "store")
    assert store.bands == ("Red", "NIR") and store.dtype == np.uint16
    sample = store[3]
    expected = pixels[:, :, 24:48, 24:48].copy()
    expected[0, :, 6:10, 0:6] = 0
    expected[1, :, 1, 6] = 0
    assert np.array_equal(sample["image"].numpy(), expected)
    assert (~sample["valid"]).sum((1, 2)).tolist() == [24, 1, 0]
    row = store.table.to_pylist()[3]
    assert row["cloud"] == pytest.approx([24 / 576, 0, 0])
    assert np.array_equal(store[4]["image"].numpy(), pixels[:, :, :24, :24] + 1)


@pytest.mark.parametrize(
    "name", ["20200105_valid.tif", "2020-01-05_valid.tif", "20200105_S2_valid.tiff"]
)
def test_validity_is_found_as_in_a_series(tmp_path, name):
    names = ["20200105_S2", "20200506", "20200907"]
    write_rasters(tmp_path / "r" / "a", names, frames(3, height=24, width=24))
    cloudy = np.ones((24, 24), "uint8")
    cloudy[:4], cloudy[4:6] = 0, 255
    write_tif(tmp_path / "r" / "a" / name, cloudy, nodata=255)
    report = build_store(RasterSource(tmp_path / "r", 24, None), tmp_path / "store", dates=3)
    assert report["scenes"] == {"candidates": 3, "accepted": 3}
    valid = StoreSeries(tmp_path / "store")[0]["valid"]
    assert torch.equal(valid, RasterSeries(tmp_path / "r")[0]["valid"])
    assert (~valid).sum((1, 2)).tolist() == [6 * 24, 0, 0]


def test_validity_without_an_image_rejects_its_location(tmp_path):
    for name in "ab":
        write_rasters(tmp_path / "r" / name, ["2019", "2020"], frames(2, height=24, width=24))
    write_tif(tmp_path / "r" / "a" / "2018_valid.tif", np.ones((24, 24), "uint8"))
    report = build_store(RasterSource(tmp_path / "r", 24, None), tmp_path / "store", dates=2)
    assert report["locations"] == {"candidates": 2, "accepted": 1, "unreadable": 1}
    (row,) = rejections(tmp_path / "store")
    assert row["location"] == "a" and "2018_valid.tif: no image of the same date" in row["detail"]
    with pytest.raises(DataError, match="2018_valid.tif: no image of the same date"):
        RasterSource(tmp_path / "r" / "a", 24, None)


def test_rasters_beside_folders_of_rasters(tmp_path):
    for folder in (tmp_path / "r", tmp_path / "r" / "a"):
        write_rasters(folder, ["2019", "2020"], frames(2, height=24, width=24))
    with pytest.raises(DataError, match="holds rasters named.*and also folders of them"):
        RasterSource(tmp_path / "r", 24, None)


def test_dark_pixels_with_data(tmp_path):
    """0 in every band is data where another value is nodata, and no data where nothing is said."""
    pixels = frames(3, bands=2, height=24, width=24)
    pixels[:, :, :2] = 0  # dark
    pixels[:, 0, 2:4] = 999  # no data
    pixels[0, 1, 4] = 0  # dark in one band only
    for name, image, nodata in zip(("2019", "2020", "2021"), pixels, (999, 999, None)):
        write_tif(tmp_path / "r" / "a" / f"{name}.tif", image, nodata=nodata)
    build_store(RasterSource(tmp_path / "r", 24, None), tmp_path / "store", dates=3)
    sample = StoreSeries(tmp_path / "store")[0]
    valid = torch.ones(3, 24, 24, dtype=torch.bool)
    valid[:2, 2:4] = False
    valid[2, :2] = False
    assert torch.equal(sample["valid"], valid)
    expected = pixels.copy()
    expected[:2, :, :2], expected[:2, :, 2:4] = 1, 0
    assert np.array_equal(sample["image"].numpy(), expected)
    series = RasterSeries(tmp_path / "r")[0]
    assert torch.equal(series["valid"][:2], valid[:2])


def test_a_single_series_of_rasters(tmp_path):
    write_rasters(tmp_path / "one", ["2019", "2020"], frames(2, height=24, width=24))
    source = RasterSource(tmp_path / "one", 24, ["R", "G", "B"])
    assert source.names() == ["one"] and source.content.bands == ("R", "G", "B")
    build_store(source, tmp_path / "store", dates=2)
    image = open_series(tmp_path / "store")[0]["image"].numpy()
    assert np.array_equal(image, RasterSeries(tmp_path / "one")[0]["image"].numpy())


def test_float_rasters_are_refused(tmp_path):
    write_rasters(tmp_path / "one", ["2019", "2020"], frames(2, dtype="float32"))
    with pytest.raises(DataError, match="holds float32; locations hold uint8 or uint16"):
        RasterSource(tmp_path / "one", 24, None)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("wrong bands", {"descriptions": ("B02", "B03", "B04")}),
        ("wrong bands", {"descriptions": ()}),
        ("wrong units", {"scales": (1e-3,) * 3}),
        ("wrong units", {"offsets": (-0.1, 0.0, 0.0)}),
    ],
)
def test_rasters_with_other_bands_or_units_than_the_first(tmp_path, reason, change):
    usual = {"descriptions": ("B04", "B03", "B02"), "scales": (1e-4,) * 3, "offsets": (0.0,) * 3}
    for number, settings in enumerate((usual, usual, usual | change), 1):
        path = tmp_path / f"r/a/2020010{number}.tif"
        write_tif(path, scene(number, 24), descriptions=settings["descriptions"])
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = settings["scales"], settings["offsets"]
    report = build_store(RasterSource(tmp_path / "r", 24, None), tmp_path / "store", dates=2)
    assert report["scenes"] == {"candidates": 3, "accepted": 2, reason: 1}
    (row,) = rejections(tmp_path / "store")
    assert row["reason"] == reason and row["scene"] == "20200103.tif"


def test_validity_that_lies_elsewhere(tmp_path):
    folder = tmp_path / "r" / "a"
    write_rasters(folder, ["20200101", "20200102", "20200103"], frames(3, height=24, width=48))
    usable = np.ones((24, 48), "uint8")
    write_tif(folder / "20200101_valid.tif", usable)
    write_tif(folder / "20200102_valid.tif", usable,
              transform=TRANSFORM @ Affine.translation(5, 0))  # fmt: skip
    write_tif(folder / "20200103_valid.tif", np.ones((48, 96), "uint8"),
              transform=TRANSFORM @ Affine.scale(0.5))  # fmt: skip
    source = RasterSource(tmp_path / "r", 24, None)
    report = build_store(source, tmp_path / "store", dates=1)
    assert report["scenes"] == {
        "candidates": 6, "accepted": 2, "mismatched grids": 2, "wrong size": 2,
    }  # fmt: skip


def test_a_crs_without_a_place_on_earth(tmp_path):
    crs = 'LOCAL_CS["arbitrary",UNIT["metre",1]]'
    write_rasters(
        tmp_path / "r/a", ["2019", "2020"], frames(2, height=24, width=24), crs=crs
    )  # fmt: skip
    build_store(RasterSource(tmp_path / "r", 24, None), tmp_path / "store", dates=2)
    (row,) = StoreSeries(tmp_path / "store").table.to_pylist()
    assert np.isnan(row["longitude"]) and np.isnan(row["latitude"])


def test_locations_with_an_at_sign(tmp_path):
    for name, width in (("site@a", 24), ("wide@b", 48)):
        pixels = frames(2, height=24, width=width, seed=width)
        write_rasters(tmp_path / "r" / name, ["2019", "2020"], pixels)
    source = RasterSource(tmp_path / "r", 24, None)
    assert source.names() == ["site@a", "wide@b@0,0", "wide@b@0,24"]
    build_store(source, tmp_path / "store", dates=2)
    store = StoreSeries(tmp_path / "store")
    assert np.array_equal(store[2]["image"].numpy(), pixels[:, :, :, 24:])
