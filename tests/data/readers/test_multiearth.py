import re
import shutil

import numpy as np
import pytest
import torch

from tests.data.fixtures import multiearth
from tests.data.writers import write_tif
from timo.data import DataError, validate_sample
from timo.data.readers import MultiEarth
from timo.data.readers.multiearth import split_of

PLACE = (("-55.20", "-4.39"),)


def test_truth(tmp_path):
    truth = multiearth.write(tmp_path, size=32)
    dataset = MultiEarth(tmp_path, "all")
    assert dataset.bands == ("B01", "B02", "B03", "B04") and dataset.units == "reflectance"
    assert (dataset.scale == torch.tensor(1e-4)).all() and dataset.offset.tolist() == [0] * 4
    assert len(dataset) == 8  # four places, two months
    for index, name in enumerate(dataset.names):
        lon, lat, month = re.fullmatch(r"(.+?)_(.+?)_(.+)", name).groups()
        days, frames = truth["images"]["sent2"][lon, lat]
        end = np.datetime64(month[:7].replace("_", "-"), "M") + 1
        kept = days < end.astype("datetime64[D]").astype(int)
        sample = dataset[index]
        np.testing.assert_array_equal(sample["dates"], days[kept])
        cloudy = frames[kept, -1] > 0
        np.testing.assert_array_equal(sample["valid"], ~cloudy)
        expected = np.where(cloudy[:, None], 0, frames[kept, :4])
        np.testing.assert_array_equal(sample["image"], expected)
        np.testing.assert_array_equal(sample["mask"], truth["masks"][lon, lat][month])
    assert not sample["valid"][0, :, :16].any() and sample["valid"][0, :, 16:].all()


def test_radar_in_decibels(tmp_path):
    truth = multiearth.write(tmp_path, size=32, locations=PLACE)
    dataset = MultiEarth(tmp_path, "all", sensor="Sentinel1", select=["VV", "VH"])
    sample = dataset[0]
    days, frames = truth["images"]["sent1"][PLACE[0]]
    np.testing.assert_array_equal(sample["image"], frames)
    assert dataset.units == "dB" and dataset.scale.tolist() == [1, 1]
    holes = frames[0, 0].copy()
    holes[3, 4] = np.nan
    path = tmp_path / "sent1" / "Sentinel1_VV_-55.20_-4.39_2019_05_27.tiff"
    path.unlink()
    write_tif(path, holes, crs=None)
    sample = dataset[0]
    assert not sample["valid"][0, 3, 4] and sample["valid"].sum() == sample["valid"].numel() - 1
    np.testing.assert_array_equal(sample["image"][1], frames[1])  # no other pixel suffers


def test_landsat_on_the_grid_of_the_label(tmp_path):
    truth = multiearth.write(tmp_path, size=256, locations=PLACE, mask_dates=("2021_05_01",))
    dataset = MultiEarth(tmp_path, "all", sensor="Landsat8", select=["SR_B2", "ST_B10"])
    assert dataset.units == "reflectance; ST_B10 in K"
    assert torch.allclose(dataset.offset, torch.tensor([-0.2, 149.0]))
    sample = dataset[0]
    assert sample["image"].shape == (2, 2, 256, 256) and sample["valid"].all()
    frames = truth["images"]["landsat8"][PLACE[0]][1]
    assert frames.shape[-1] == 85
    centre = np.array([1, 4, 127, 254])  # pixels well inside Landsat's
    np.testing.assert_array_equal(
        sample["image"][:, 0][:, centre][..., centre],
        frames[:, 1][:, centre * 85 // 256][..., centre * 85 // 256],
    )
    month = MultiEarth(tmp_path, "all", sensor="Landsat8", months=2)[0]
    assert len(month["dates"]) == 1


def test_months_before_the_label(tmp_path):
    multiearth.write(
        tmp_path,
        size=16,
        locations=PLACE,
        dates={"sent2": ("2018_06_30", "2018_07_01", "2019_06_30", "2019_07_01")},
        mask_dates=("2019_06_01",),
    )
    count = {m: len(MultiEarth(tmp_path, "all", months=m)[0]["dates"]) for m in (1, 12, 13, None)}
    assert count == {1: 1, 12: 2, 13: 3, None: 3}


def test_the_offset_of_processing_baseline_04(tmp_path):
    dates = ("2022_01_24", "2022_01_25")
    truth = multiearth.write(
        tmp_path, size=16, locations=PLACE, dates={"sent2": dates}, mask_dates=("2022_01_01",),
        cloud=False,
    )  # fmt: skip
    frames = truth["images"]["sent2"][PLACE[0]][1][:, :4].astype(int)
    image = MultiEarth(tmp_path, "all")[0]["image"].numpy()
    np.testing.assert_array_equal(image[0], frames[0])
    np.testing.assert_array_equal(image[1], np.maximum(frames[1] - 1000, 1))
    raw = MultiEarth(tmp_path, "all", harmonised=True)[0]["image"].numpy()
    np.testing.assert_array_equal(raw, frames)


def test_splits_do_not_overlap_on_the_ground():
    places = [(lon, lat) for lon in range(-5700, -5300, 2) for lat in range(-500, -300, 2)]
    splits = {place: split_of(f"{place[0] / 100:.2f}_{place[1] / 100:.2f}") for place in places}
    counts = {s: list(splits.values()).count(s) for s in ("train", "val", "test", None)}
    assert 0.35 < counts["train"] / len(places) < 0.6 and min(counts.values()) > 0.05 * len(places)
    for (lon, lat), split in splits.items():
        for east in (-2, 0, 2):  # an image is 2.56 km wide, 0.02 degrees are 2.2 km
            for north in (-2, 0, 2):
                other = splits.get((lon + east, lat + north))
                assert None in (split, other) or split == other


def test_a_missing_band_is_no_zero(tmp_path):
    multiearth.write(tmp_path, size=16, locations=PLACE)
    (tmp_path / "sent2" / "Sentinel2_B3_-55.20_-4.39_2019_07_01.tiff").unlink()
    with pytest.raises(DataError, match="1 of 15 band files are missing, as B03 of -55.20_-4.39_"):
        MultiEarth(tmp_path, "all")
    left = MultiEarth(tmp_path, "all", incomplete="skip")
    assert [len(left[i]["dates"]) for i in range(len(left))] == [2, 2]
    assert len(MultiEarth(tmp_path, "all", select=["B02"])[1]["dates"]) == 3


def test_without_labels_and_clouds(tmp_path):
    truth = multiearth.write(tmp_path, size=16, locations=PLACE)
    shutil.rmtree(tmp_path / "deforestation")
    for path in tmp_path.rglob("*QA60*"):
        path.unlink()
    with pytest.raises(DataError, match="band files are missing, as QA60 of"):
        MultiEarth(tmp_path, "all", labels=False)
    dataset = MultiEarth(tmp_path, "all", labels=False, clouds=False)
    assert dataset.names == ("-55.20_-4.39",) and "mask" not in dataset[0]
    np.testing.assert_array_equal(dataset[0]["image"], truth["images"]["sent2"][PLACE[0]][1][:, :4])


def test_labels_without_images_are_counted(tmp_path, caplog):
    multiearth.write(tmp_path, size=16, locations=PLACE, mask_dates=("2019_06_01", "2015_01_01"))
    assert len(MultiEarth(tmp_path, "all")) == 1
    assert "1 of 2 acquisitions for labels are missing, as -55.20_-4.39_2015_01_01" in caplog.text


@pytest.mark.parametrize(
    "band, pixels, message",
    [
        ("B2", np.ones((2, 16, 16), np.uint16), "its band count is 2, it must be 1"),
        ("B2", np.ones((16, 16), np.uint8), "its dtype is uint8, it must be uint16"),
        ("B2", np.ones((16, 8), np.uint16), r"its size is \(16, 8\)"),
        ("QA60", np.ones((8, 16), np.uint16), r"its size is \(8, 16\)"),
        (None, np.full((16, 16), 7, np.uint8), r"holds the labels \[7\]"),
        (None, np.ones((16, 16), np.int16), "its dtype is int16"),
    ],
)
def test_files_that_are_not_as_published(tmp_path, band, pixels, message):
    multiearth.write(tmp_path, size=16, locations=PLACE)
    if band is None:
        path = tmp_path / "deforestation" / "Deforestation_-55.20_-4.39_2019_06_01.tiff"
    else:
        path = tmp_path / "sent2" / f"Sentinel2_{band}_-55.20_-4.39_2019_06_06.tiff"
    path.unlink()
    write_tif(path, pixels, crs=None)
    with pytest.raises(DataError, match=message) as error:
        MultiEarth(tmp_path, "all")[0]
    assert str(path) in str(error.value)


def test_the_same_acquisition_twice(tmp_path):
    multiearth.write(tmp_path, size=16, locations=PLACE)
    path = tmp_path / "sent2" / "Sentinel2_B2_-55.20_-4.39_2019_06_06.tiff"
    (tmp_path / "more").mkdir()
    shutil.copy(path, tmp_path / "more")
    with pytest.raises(DataError, match="are the same acquisition; keep one"):
        MultiEarth(tmp_path, "all")


def test_a_name_without_a_date(tmp_path):
    multiearth.write(tmp_path, size=16, locations=PLACE)
    path = tmp_path / "sent2" / "Sentinel2_B2_-55.20_-4.39_2019_06_06.tiff"
    path.rename(path.with_name(path.name.replace("06_06", "13_45")))
    with pytest.raises(DataError, match="2019_13_45.tiff: its name holds no date"):
        MultiEarth(tmp_path, "all")


def test_real_sample(data_root):
    root = data_root / "multiearth_amazon"
    dataset = MultiEarth(root, "all")
    assert dataset.bands == ("B01", "B02", "B03", "B04") and len(dataset) == 3
    for index in range(3):
        sample = dataset[index]
        validate_sample(sample, dataset.bands)
        assert set(sample["mask"].unique().tolist()) <= {0, 1} and sample["valid"].all()
    assert dataset[1]["dates"].tolist() == [18753, 18758]  # 6 and 11 May 2021
    whole = MultiEarth(root, "all", labels=False)
    amounts = {name: len(whole[i]["dates"]) for i, name in enumerate(whole.names)}
    assert amounts["-55.20_-4.39"] == 6 and len(whole) == 7
    radar = MultiEarth(root, "all", sensor="Sentinel1", labels=False)
    assert radar[0]["image"].shape == (4, 2, 256, 256) and radar.units == "dB"
    mean, _ = radar.statistics()
    assert -25 < mean[0] < mean[1] < 0  # VH is darker than VV


def test_real_netcdf_is_the_tiff(data_root, tmp_path):
    root = data_root / "multiearth_amazon"
    shutil.copytree(root / "sent2", tmp_path / "sent2")
    shutil.copy(root / "deforestation_sample.nc", tmp_path)
    tiff, netcdf = MultiEarth(root, "all"), MultiEarth(tmp_path, "all")
    assert netcdf.names == tiff.names
    for index in range(len(tiff)):
        assert torch.equal(netcdf[index]["mask"], tiff[index]["mask"])
    with pytest.raises(DataError, match="holds no Landsat5.*no NetCDF file of Landsat5"):
        MultiEarth(tmp_path, "all", sensor="Landsat5")


@pytest.mark.parametrize(
    "folder, sensor, options",
    [
        ("sent2", "Sentinel2", {}),
        ("sent2", "Sentinel2", {"select": ["B04", "B01"], "clouds": False, "labels": False}),
        ("sent1", "Sentinel1", {}),
        ("landsat8", "Landsat8", {"months": None}),
    ],
)
def test_images_in_netcdf_are_the_tiffs(tmp_path, folder, sensor, options):
    truth = multiearth.write(tmp_path / "tiff", size=64, mask_dates=("2021_05_01",))
    multiearth.write_netcdf(tmp_path / "nc" / "images.nc", truth, folder)
    shutil.copytree(tmp_path / "tiff" / "deforestation", tmp_path / "nc" / "deforestation")
    options = {"months": None} | options
    tiff = MultiEarth(tmp_path / "tiff", "all", sensor=sensor, **options)
    netcdf = MultiEarth(tmp_path / "nc", "all", sensor=sensor, **options)
    assert len(tiff) == 4 and netcdf.names == tiff.names and netcdf.bands == tiff.bands
    for index in range(len(tiff)):
        a, b = tiff[index], netcdf[index]
        assert a.keys() == b.keys() and a["image"].float().std() > 0
        for key in a:
            assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
    both = shutil.copytree(tmp_path / "tiff", tmp_path / "nc" / "tiff")  # the TIFFs are read
    shutil.rmtree(both / "deforestation")
    assert len(MultiEarth(tmp_path / "nc", "all", sensor=sensor, **options)) == 4
    shutil.copy(tmp_path / "nc" / "images.nc", tmp_path / "nc" / "again.nc")
    with pytest.raises(DataError, match="again.nc and .*images.nc hold the same acquisition"):
        MultiEarth(tmp_path / "nc", "all", sensor=sensor)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.9, 0.99])
def test_images_in_a_netcdf_cut_short(tmp_path, keep):
    truth = multiearth.write(tmp_path / "tiff", size=16, locations=PLACE)
    path = multiearth.write_netcdf(tmp_path / "nc" / "images.nc", truth, "sent2")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="images.nc.* cannot be read as a raster"):
        MultiEarth(tmp_path / "nc", "all", labels=False)[0]


def test_a_netcdf_of_another_type(tmp_path, monkeypatch):
    truth = multiearth.write(tmp_path / "tiff", size=16, locations=PLACE)
    monkeypatch.setitem(multiearth.SOURCES, "sent1", "Sentinel-2")
    multiearth.write_netcdf(tmp_path / "nc" / "images.nc", truth, "sent1")
    with pytest.raises(DataError, match="images.nc: images are float32; they must be uint16"):
        MultiEarth(tmp_path / "nc", "all", labels=False, clouds=False)[0]


@pytest.mark.parametrize("keep", [0, 100, 9000, 30000])
def test_a_netcdf_cut_short(data_root, tmp_path, keep):
    content = (data_root / "multiearth_amazon" / "deforestation_sample.nc").read_bytes()
    multiearth.write(tmp_path, size=16, locations=PLACE)
    (tmp_path / "labels.nc").write_bytes(content[:keep])
    with pytest.raises(DataError, match="labels.nc.* cannot be read as a raster"):
        MultiEarth(tmp_path, "all")
