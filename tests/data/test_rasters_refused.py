"""Every bad folder of rasters is one error that names the file and what to do."""

import numpy as np
import pytest
from rasterio.transform import Affine

from tests.data.writers import frames, write_rasters, write_tif
from timo.data import DataError, RasterSeries


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_truncated_file(tmp_path):
    paths = write_rasters(tmp_path, ["2001", "2002"], frames(2))
    cut(paths[1], 0.5)
    with pytest.raises(DataError, match="2002.tif: cannot be read as a raster.*fetch or write"):
        RasterSeries(tmp_path)[0]
    cut(paths[1], 0)
    with pytest.raises(DataError, match="2002.tif: cannot be read as a raster"):
        RasterSeries(tmp_path)


def test_file_that_vanishes_or_was_never_there(tmp_path):
    paths = write_rasters(tmp_path, ["2001", "2002"], frames(2))
    data = RasterSeries(tmp_path)
    paths[0].unlink()
    with pytest.raises(DataError, match="2001.tif: cannot be read as a raster.*missing"):
        data[0]
    paths[0].symlink_to("elsewhere.tif")
    with pytest.raises(DataError, match="2001.tif: cannot be read as a raster"):
        RasterSeries(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crs": "EPSG:32719"}, r"its CRS is EPSG:32719, that of .*2001.tif is EPSG:32718"),
        ({"transform": Affine(10, 0, 500_005, 0, -10, 9_000_000)}, r"its transform is \(10"),
        ({"transform": Affine(10.01, 0, 500_000, 0, -10, 9_000_000)}, "its transform is"),
        ({"pixels": frames(1, width=51)[0]}, "its size is 40 x 51, that of .* is 40 x 50 pixels"),
    ],
)
def test_another_grid(tmp_path, change, message):
    write_rasters(tmp_path, ["2001", "2002"], frames(2))
    options = {"pixels": frames(1)[0]} | change
    write_tif(tmp_path / "2003.tif", **options)
    remedy = r".*gdalwarp -t_srs EPSG:32718 -te 500000.0 8999600.0 500500.0 9000000.0 -ts 50 40"
    with pytest.raises(DataError, match="2003.tif: " + message + remedy):
        RasterSeries(tmp_path)
    (tmp_path / "2003.tif").rename(tmp_path / "mask.tif")
    with pytest.raises(DataError, match="mask.tif: " + message):
        RasterSeries(tmp_path)


def test_rounding_of_the_transform_is_no_other_grid(tmp_path):
    write_rasters(tmp_path, ["2001"], frames(1))
    nudged = Affine(10, 0, 500_000.01, 0, -10, 9_000_000)
    write_tif(tmp_path / "2002.tif", frames(1)[0], transform=nudged)
    assert len(RasterSeries(tmp_path)) == 1


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (
            frames(1, bands=2)[0],
            {"descriptions": "RG"},
            "its band count is 2, that of .*2001.tif is 3; write the same",
        ),
        (frames(1, dtype="uint8")[0], {}, "its dtype is uint8, .* is uint16; .*gdal_translate -ot"),
        (frames(1)[0], {"descriptions": "GRB"}, r"its band descriptions is \('G', 'R', 'B'\)"),
    ],
)
def test_another_content(tmp_path, pixels, options, message):
    write_rasters(tmp_path, ["2001", "2002"], frames(2), descriptions="RGB")
    write_tif(tmp_path / "2003.tif", pixels, **({"descriptions": "RGB"} | options))
    with pytest.raises(DataError, match="2003.tif: " + message):
        RasterSeries(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["2001", "2001_07_01"], "2001.tif and .*2001_07_01.tif have the same date.*keep one"),
        (["20010101_B2", "20010101_B3"], "same date.*gdalbuildvrt -separate"),
        (["2001", "dem"], "dem.tif: its name must begin with the acquisition date"),
        (["2001", "2002_valid"], "2002_valid.tif: no image of the same date.*rename"),
        (
            ["2001", "2001_mask", "2001_07_01_mask"],
            "2001_07_01_mask.tif and .*2001_mask.tif both belong to 2001.tif; keep one",
        ),
        (["2001_S2", "2001_S2_valid", "2001_valid"], "both belong to 2001_S2.tif; keep one"),
        (["2001", "2001_mask", "mask"], "mask.tif: lies beside .*2001_mask.tif; keep one"),
        (["mask"], "holds no rasters named"),
    ],
)
def test_bad_names(tmp_path, names, message):
    write_rasters(tmp_path, names, frames(len(names), bands=1, dtype="uint8"))
    with pytest.raises(DataError, match=message):
        RasterSeries(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (frames(1, bands=2, dtype="uint8")[0], "mask.tif: must have 1 band, has 2; write one"),
        (frames(1, bands=1, dtype="float32")[0], "mask.tif: must hold integers, holds float32"),
    ],
)
def test_bad_mask(tmp_path, pixels, message):
    write_rasters(tmp_path, ["2001"], frames(1))
    write_tif(tmp_path / "mask.tif", pixels)
    with pytest.raises(DataError, match=message):
        RasterSeries(tmp_path)


def test_labels_out_of_range(tmp_path):
    write_rasters(tmp_path / "a", ["2001"], frames(1))
    write_tif(tmp_path / "a" / "mask.tif", np.full((40, 50), 1000, "int16"))
    with pytest.raises(DataError, match="'a': labels must be in 0 ... 254.*1000 ... 1000"):
        RasterSeries(tmp_path)[0]
    assert (RasterSeries(tmp_path, ignore_label=1000)[0]["mask"] == 255).all()


def test_complex_pixels(tmp_path):
    write_rasters(tmp_path, ["2001"], frames(1, dtype="complex64"))
    with pytest.raises(DataError, match="2001.tif: pixels of type complex64 are not supported"):
        RasterSeries(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="none: is not a folder"):
        RasterSeries(tmp_path / "none")
    with pytest.raises(DataError, match="is empty; it must hold rasters named"):
        RasterSeries(tmp_path)
    write_rasters(tmp_path / "a", ["2001"], frames(1))
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="b: holds no rasters.*complete or remove it.*samples="):
        RasterSeries(tmp_path)
    with pytest.raises(DataError, match="c: holds no rasters"):
        RasterSeries(tmp_path, samples=["a", "c"])
    write_rasters(tmp_path, ["2002"], frames(1))
    with pytest.raises(DataError, match="holds rasters named.*and also folders of them"):
        RasterSeries(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile: must be a positive int"),
        ({"tile": (8, 8, 8)}, "tile: must be a positive int"),
        ({"stride": 8}, "stride: needs tile"),
        ({"tile": 8, "stride": -1}, "stride: must be a positive int"),
        ({"min_valid": 2}, "min_valid: must be a share"),
        ({"scale": [1, 2]}, "scale: must be one finite number, or one for each of the 3 bands"),
        ({"select": "band1"}, "select: must be a sequence of band names"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    write_rasters(tmp_path, ["2001"], frames(1))
    with pytest.raises(ValueError, match=message):
        RasterSeries(tmp_path, **options)
