import pickle
import warnings

import numpy as np
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader

from tests.data.writers import TRANSFORM, frames, write_rasters, write_tif
from timo.data import (
    DataError,
    RasterSeries,
    collate_series,
    open_series,
    open_water,
    validate_sample,
)

NAMES = ["2020", "201807", "20190105_x", "2020_03_04_L2A", "20200101T101010"]
BY_DATE = [1, 2, 4, 3, 0]  # positions in NAMES; sorted as text they would be 1, 2, 0, 4, 3
DAYS = ["2018-07-15", "2019-01-05", "2020-01-01", "2020-03-04", "2020-07-01"]


def days(texts):
    return np.array(texts, "datetime64[D]").astype(int).tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64", "int32"])
def test_frames_come_sorted_with_their_pixels(tmp_path, dtype):
    pixels = frames(5, dtype=dtype)
    write_rasters(tmp_path, NAMES, pixels)
    data = RasterSeries(tmp_path)
    assert len(data) == 1 and data.bands == ("band1", "band2", "band3")
    sample = data[0]
    validate_sample(sample, data.bands)
    kept = dtype if dtype in ("uint8", "uint16") else "float32"
    assert sample["image"].dtype == getattr(torch, kept)
    assert np.array_equal(sample["image"].numpy(), pixels[BY_DATE])
    assert sample["dates"].tolist() == days(DAYS)
    assert sample["valid"].all() and "mask" not in sample and "window" not in sample
    series = data.series[0]
    assert (series.height, series.width) == (40, 50) and series.transform == TRANSFORM
    assert series.crs.to_epsg() == 32718 and sample["name"] == tmp_path.name


def test_validity_and_masks_are_sorted_with_the_frames(tmp_path):
    write_rasters(tmp_path, NAMES, frames(5))
    valid = np.random.default_rng(2).integers(0, 2, (5, 40, 50)).astype("uint8")
    mask = np.random.default_rng(3).integers(0, 9, (5, 40, 50)).astype("uint8")
    dates = ["2020", "201807", "2019-01-05", "20200304", "20200101T101010"]
    for i in (0, 2, 3, 4):
        write_tif(tmp_path / f"{dates[i]}_valid.tif", valid[i])
        write_tif(tmp_path / f"{dates[i]}_mask.tif", mask[i], nodata=7)
    sample = RasterSeries(tmp_path)[0]
    valid[1], mask[1] = 1, 255
    assert np.array_equal(sample["valid"].numpy(), valid[BY_DATE] == 1)
    assert np.array_equal(sample["mask"].numpy(), np.where(mask == 7, 255, mask)[BY_DATE])


def test_validity_and_masks_by_the_names_of_their_images(tmp_path):
    write_rasters(tmp_path, ["20200105_S2", "2020-05-06"], frames(2))
    usable, labels = np.random.default_rng(2).integers(0, 2, (2, 40, 50)).astype("uint8")
    write_tif(tmp_path / "20200105_S2_valid.tif", usable)
    write_tif(tmp_path / "20200105_S2_mask.tif", labels)
    write_tif(tmp_path / "20200506_mask.tif", labels)
    sample = RasterSeries(tmp_path)[0]
    assert np.array_equal(sample["valid"][0].numpy(), usable == 1) and sample["valid"][1].all()
    assert np.array_equal(sample["mask"].numpy(), [labels, labels])


def test_validity_by_the_day_of_an_image(tmp_path):
    write_rasters(tmp_path, ["20200105T103000_S2", "2020-05-06"], frames(2))
    usable = np.random.default_rng(2).integers(0, 2, (40, 50)).astype("uint8")
    write_tif(tmp_path / "20200105_valid.tif", usable)
    sample = RasterSeries(tmp_path)[0]
    assert np.array_equal(sample["valid"][0].numpy(), usable == 1) and sample["valid"][1].all()
    write_rasters(tmp_path, ["20200105T160000_S2"], frames(1))
    with pytest.raises(DataError, match="20200105_valid.tif: no image of the same date"):
        RasterSeries(tmp_path)


def test_series_of_one_name_are_refused(tmp_path):
    for region in ("north", "south"):
        write_rasters(tmp_path / region / "river", ["2001"], frames(1))
    with pytest.raises(DataError, match="samples: several series are called 'river'.*rename"):
        RasterSeries(tmp_path, samples=["north/river", "south/river"])
    assert len(RasterSeries(tmp_path, samples=["north/river"])) == 1


def test_validity_that_is_not_known(tmp_path):
    write_rasters(tmp_path, ["2001"], frames(1))
    flags = np.ones((40, 50), "uint8")
    flags[:4], flags[4:9] = 255, 0
    write_tif(tmp_path / "2001_valid.tif", flags, nodata=255)
    assert np.array_equal(RasterSeries(tmp_path)[0]["valid"][0].numpy(), flags == 1)


def test_mask_of_the_series(tmp_path):
    write_rasters(tmp_path, NAMES, frames(5))
    mask = np.random.default_rng(3).integers(0, 4, (40, 50)).astype("uint8")
    write_tif(tmp_path / "mask.tif", mask)
    sample = RasterSeries(tmp_path, ignore_label=0)[0]
    assert np.array_equal(sample["mask"].numpy(), np.where(mask == 0, 255, mask))
    assert sample["mask"].dtype == torch.int64


@pytest.mark.parametrize("given", [False, True])
def test_a_pixel_without_data_in_any_selected_band_is_not_valid(tmp_path, given):
    pixels = frames(2, dtype="int16")
    pixels[0, 0, 3, 4] = pixels[1, 2, 5, 6] = -99
    write_rasters(tmp_path, NAMES[:2], pixels, nodata=None if given else -99)
    nodata = -99 if given else None
    data = RasterSeries(tmp_path, nodata=nodata)
    everything = data[0]
    assert data.nodata == -99
    holes = (~everything["valid"]).nonzero().tolist()
    assert holes == [[0, 5, 6], [1, 3, 4]]  # NAMES[1] is the earlier
    assert everything["image"].min() == 0
    last = RasterSeries(tmp_path, nodata=nodata, select=["band3"])[0]
    assert (~last["valid"]).nonzero().tolist() == [[0, 5, 6]]


def test_mask_inside_the_file(tmp_path):
    paths = write_rasters(tmp_path, NAMES[:2], frames(2))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(paths[1], "r+") as file:
        inside = np.ones((40, 50), bool)
        inside[:7] = False
        file.write_mask(inside)
    for options in ({}, {"nodata": 0}):
        valid = RasterSeries(tmp_path, **options)[0]["valid"]
        assert np.array_equal(valid[0].numpy(), inside) and valid[1].all()


def test_nan_and_infinity_are_not_valid_and_become_0(tmp_path):
    pixels = frames(2, dtype="float32")
    pixels[0, 1, 2, 3] = np.nan
    pixels[0, 2, 2, 4] = -np.inf
    write_rasters(tmp_path, ["2001", "2002"], pixels)
    data = RasterSeries(tmp_path)
    sample = data[0]
    assert (~sample["valid"]).nonzero().tolist() == [[0, 2, 3], [0, 2, 4]]
    assert sample["image"][0, 1, 2, 3] == 0 and sample["image"][0, 2, 2, 4] == 0
    assert sample["image"].isfinite().all() and data.nonfinite(0).tolist() == [2, 0]


@pytest.mark.parametrize("given", [False, True])
def test_nan_as_nodata_is_no_fault(tmp_path, given):
    pixels = frames(1, dtype="float32")
    pixels[0, 1, 2, 3] = np.nan
    write_rasters(tmp_path, ["2001"], pixels, nodata=None if given else np.nan)
    data = RasterSeries(tmp_path, nodata=np.nan if given else None)
    assert data.nodata is None
    assert (~data[0]["valid"]).nonzero().tolist() == [[0, 2, 3]]
    assert data.nonfinite(0).tolist() == [0]


def test_bands_by_name(tmp_path):
    pixels = frames(1)
    write_rasters(tmp_path, ["2001"], pixels, descriptions=("R", "G", "B"))
    data = RasterSeries(tmp_path, select=["B", "R"], scale=[1, 2])
    assert data.bands == ("B", "R") and data.scale.tolist() == [1, 2]
    assert np.array_equal(data[0]["image"].numpy(), pixels[:, [2, 0]])
    assert RasterSeries(tmp_path, bands=["x", "y", "z"], select=["y"]).bands == ("y",)
    with pytest.raises(DataError, match="no band named N; the files hold R, G, B"):
        RasterSeries(tmp_path, select=["N"])
    with pytest.raises(DataError, match="bands: must name all 3 bands of 2001.tif.*select="):
        RasterSeries(tmp_path, bands=["x"])


def test_descriptions_of_each_date_give_way_to_stated_names(tmp_path):
    for folder in "ab":
        for name in ("2001", "2002"):
            own = [f"{folder}{name}_{band}" for band in "RGB"]
            write_tif(tmp_path / folder / f"{name}.tif", frames(1)[0], descriptions=own)
    with pytest.raises(DataError, match="2002.tif: its band descriptions .* with bands="):
        RasterSeries(tmp_path)
    data = RasterSeries(tmp_path, bands=["R", "G", "B"])
    assert len(data) == 2 and data.bands == ("R", "G", "B")


def test_scale_in_the_files(tmp_path):
    paths = write_rasters(tmp_path, ["2001", "2002"], frames(2))
    for path in paths:
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = (1e-4, 1e-4, 2e-4), (-0.1, 0, 0)
    data = RasterSeries(tmp_path, select=["band3", "band1"])
    assert data.scale.tolist() == pytest.approx([2e-4, 1e-4])
    assert data.offset.tolist() == pytest.approx([0, -0.1])
    assert RasterSeries(tmp_path, scale=1.0).scale.tolist() == [1, 1, 1]
    with rasterio.open(paths[1], "r+") as file:
        file.offsets = (0, 0, 0)
    with pytest.raises(DataError, match="2002.tif: its offsets is .* one offset for each band"):
        RasterSeries(tmp_path)


def test_folders_of_series(tmp_path):
    for name in ("b", "c", "a"):
        count = 2 + (name == "a")
        write_rasters(tmp_path / name, NAMES[:count], frames(count, seed=ord(name)))
    data = RasterSeries(tmp_path)
    assert [s.name for s in data.series] == ["a", "b", "c"]
    assert np.array_equal(data[2]["image"].numpy(), frames(2, seed=ord("c"))[[1, 0]])
    assert [s.name for s in RasterSeries(tmp_path, samples=["c", "a"]).series] == ["c", "a"]
    assert collate_series([data[0], data[1]])["image"].shape == (2, 3, 3, 40, 50)
    write_rasters(tmp_path / "d", ["2001"], frames(1, bands=4))
    with pytest.raises(DataError, match=r"d/2001.tif: its band count is 4, that of .*a/.* is 3"):
        RasterSeries(tmp_path)


def test_tiles_cover_the_raster_and_stay_inside(tmp_path):
    pixels = frames(2)
    write_rasters(tmp_path, ["2001", "2002"], pixels)
    data = RasterSeries(tmp_path, tile=16)
    seen = np.zeros((40, 50), int)
    for i in range(len(data)):
        sample = data[i]
        row, col = sample["window"]
        seen[row : row + 16, col : col + 16] += 1
        assert np.array_equal(sample["image"].numpy(), pixels[..., row : row + 16, col : col + 16])
        assert sample["valid"].all()
    assert len(data) == 12 and seen.min() == 1
    assert data[11]["window"] == (24, 34)
    assert len(RasterSeries(tmp_path, tile=(40, 16), stride=8)) == 6


def test_regions_do_not_overlap(tmp_path):
    pixels = frames(1)
    write_rasters(tmp_path, ["2001"], pixels)
    west = RasterSeries(tmp_path, tile=16, region=(0.0, 0.0, 1.0, 0.6))
    east = RasterSeries(tmp_path, tile=16, region=(0, 30, 40, 50))
    assert max(west[i]["window"][1] for i in range(len(west))) + 16 <= 30
    assert min(east[i]["window"][1] for i in range(len(east))) >= 30
    whole = RasterSeries(tmp_path, region=(8, 10, 24, 50))[0]
    assert np.array_equal(whole["image"].numpy(), pixels[..., 8:24, 10:50])
    assert whole["window"] == (8, 10)
    for region in ((0, 0, 41, 50), (0.0, 0.0, 1.0, 1.5), (5, 5, 5, 9), (0, 0, 1)):
        with pytest.raises(ValueError, match="region: must be .* within 40 x 50 pixels"):
            RasterSeries(tmp_path, region=region)


def test_a_tile_beyond_the_raster_is_padded_and_not_valid_there(tmp_path):
    pixels = frames(1)
    write_rasters(tmp_path, ["2001"], pixels)
    write_tif(tmp_path / "mask.tif", np.ones((40, 50), "uint8"))
    sample = RasterSeries(tmp_path, tile=(64, 50))[0]
    validate_sample(sample)
    assert np.array_equal(sample["image"][..., :40, :].numpy(), pixels)
    assert sample["valid"][:, :40].all() and not sample["valid"][:, 40:].any()
    assert (sample["mask"][:40] == 1).all() and (sample["mask"][40:] == 255).all()


def test_windows_with_too_few_valid_pixels_are_left_out(tmp_path):
    pixels = frames(2)
    pixels[:, :, :, :25] = 0
    pixels[0] = np.where(np.arange(50) < 30, 0, pixels[0])
    write_rasters(tmp_path, ["2001", "2002"], pixels, nodata=0)
    windows = [RasterSeries(tmp_path, tile=(40, 10), min_valid=v) for v in (0, 0.01, 0.5, 1)]
    assert [len(w) for w in windows] == [5, 3, 2, 2]
    with pytest.raises(DataError, match="no window has 10% valid pixels; the best has 0.0%"):
        RasterSeries(tmp_path, tile=(40, 10), region=(0, 0, 40, 20), min_valid=0.1)
    with pytest.raises(DataError, match="use a smaller tile, for what lies beyond a raster is not"):
        RasterSeries(tmp_path, tile=224, min_valid=0.5)


@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_cache_change_nothing(tmp_path, cache):
    pixels = frames(5, dtype="float32")
    pixels[0, 0, :9, 20:] = np.nan
    write_rasters(tmp_path, NAMES, pixels)
    write_tif(tmp_path / "mask.tif", frames(1, 1, dtype="uint8")[0, 0])
    expected = [RasterSeries(tmp_path, tile=16)[i] for i in range(12)]
    data = pickle.loads(pickle.dumps(RasterSeries(tmp_path, tile=16, cache=cache)))
    for workers in (0, 1, 2):
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        for got, want in zip(loader, expected, strict=True):
            for key in ("image", "dates", "valid", "mask"):
                assert torch.equal(got[key], want[key])
    data[0]["image"].zero_()
    assert torch.equal(data[0]["image"], expected[0]["image"])


def test_labels_made_on_the_fly(tmp_path):
    pixels = frames(2)
    pixels[0, 0, 0, 0] = 0
    write_rasters(tmp_path, ["2001", "2002"], pixels, nodata=0)
    bands = ("SWIR1", "NIR", "Green")
    sample = RasterSeries(tmp_path, bands=bands, scale=1e-4, labels=open_water)[0]
    expected = (pixels[:, 2] > pixels[:, 0]).astype(int)
    expected[0, 0, 0] = 255
    assert np.array_equal(sample["mask"].numpy(), expected)
    wrong = RasterSeries(tmp_path, labels=lambda image, valid, bands: image)
    with pytest.raises(ValueError, match=r"labels: must return int64 of shape \(40, 50\)"):
        wrong[0]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_rasters_without_georeference(tmp_path):
    write_rasters(tmp_path, ["2001", "2002"], frames(2), crs=None, transform=None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert RasterSeries(tmp_path)[0]["image"].shape == (2, 3, 40, 50)
    assert not shown


def test_open_series(tmp_path):
    with pytest.raises(DataError, match="holds neither rasters named.*nor series.npy"):
        open_series(tmp_path)
    write_rasters(tmp_path / "a", ["2001"], frames(1))
    assert isinstance(open_series(tmp_path, tile=8), RasterSeries)
    (tmp_path / "series.npy").touch()
    with pytest.raises(DataError, match="holds both"):
        open_series(tmp_path)


@pytest.mark.parametrize("path", [".", "../here", "sub/.."])
def test_names_of_paths_seen_from_within(tmp_path, monkeypatch, path):
    write_rasters(tmp_path / "here", ["2001"], frames(1))
    (tmp_path / "here" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert RasterSeries(path)[0]["name"] == "here"
    (tmp_path / "link").symlink_to("here")
    assert RasterSeries(tmp_path / "link")[0]["name"] == "link"


@pytest.mark.parametrize("suffix", [".TIF", ".tiff", ".Tiff"])
def test_open_series_in_every_spelling(tmp_path, suffix):
    (path,) = write_rasters(tmp_path / "a", ["2001"], frames(1))
    path = path.rename(path.with_suffix(suffix))
    assert len(open_series(tmp_path)) == len(open_series(tmp_path / "a")) == 1
    with pytest.raises(DataError, match=f"2001{suffix}: is no folder; give the folder of"):
        open_series(path)
    with pytest.raises(DataError, match="none: does not exist; give the folder of"):
        open_series(tmp_path / "none")


def test_pucallpa(data_root):
    bands = ("SWIR1", "NIR", "Red", "Green")
    data = RasterSeries(data_root / "pucallpa_landsat", bands=bands, labels=open_water)
    sample = data[0]
    validate_sample(sample, bands)
    assert sample["image"].shape == (8, 4, 377, 697) and sample["image"].dtype == torch.uint8
    assert sample["dates"].tolist() == days([f"{y}-07-01" for y in range(1985, 2021, 5)])
    assert 0.9995 < sample["valid"].float().mean() < 1
    water = (sample["mask"] == 1).float().mean((1, 2))
    assert (water > 0.03).all() and (water < 0.07).all()
    changed = ((sample["mask"][0] == 1) != (sample["mask"][-1] == 1)).float().mean()
    assert changed > 0.03  # the river moves: most of its bed of 1985 is land in 2020
