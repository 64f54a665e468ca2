import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.writers import frames, write_numpy
from timo.data import DataError, NumpySeries, open_series, open_water, validate_sample

DATES = ["2020-05-01", "2019-01-02T10:11:25", "2021", "2019-01-02T10:04:09"]
BY_DATE = [3, 1, 0, 2]
DAYS = ["2019-01-02", "2019-01-02", "2020-05-01", "2021-07-01"]


def companions(seed=5):
    rng = np.random.default_rng(seed)
    return rng.random((4, 40, 50)) < 0.5, rng.integers(0, 6, (4, 40, 50))


@pytest.mark.parametrize("layout", ["TCHW", "THWC"])
@pytest.mark.parametrize("auto", [False, True])
def test_frames_validity_and_masks_come_sorted(tmp_path, layout, auto):
    pixels = frames(4)
    valid, mask = companions()
    stored = pixels if layout == "TCHW" else pixels.transpose(0, 2, 3, 1)
    write_numpy(tmp_path / "a", stored, DATES, valid, mask.astype("uint8"))
    data = NumpySeries(tmp_path / "a", layout="auto" if auto else layout)
    sample = data[0]
    validate_sample(sample, data.bands)
    assert np.array_equal(sample["image"].numpy(), pixels[BY_DATE])
    assert np.array_equal(sample["valid"].numpy(), valid[BY_DATE])
    assert np.array_equal(sample["mask"].numpy(), mask[BY_DATE])
    assert sample["dates"].tolist() == np.array(DAYS, "datetime64[D]").astype(int).tolist()
    assert sample["name"] == "a" and data.bands == ("band1", "band2", "band3")


def test_mask_of_the_series_cloud_mask_and_trailing_axes(tmp_path):
    pixels = frames(4)
    valid, mask = companions()
    write_numpy(tmp_path, pixels, DATES)
    np.save(tmp_path / "cloud.npy", (~valid).astype("uint8")[..., None])
    np.save(tmp_path / "labels.npy", mask[0, :, :, None])
    data = NumpySeries(
        tmp_path, valid="cloud.npy", invalid_where=1, mask="labels.npy", ignore_label=0
    )
    sample = data[0]
    assert np.array_equal(sample["valid"].numpy(), valid[BY_DATE])
    assert np.array_equal(sample["mask"].numpy(), np.where(mask[0] == 0, 255, mask[0]))


@pytest.mark.parametrize("extra", [False, True])
def test_series_one_pixel_wide(tmp_path, extra):
    valid, mask = (array[..., :1] for array in companions())
    stored = [array[..., None] if extra else array for array in (valid, mask)]
    write_numpy(tmp_path, frames(4)[..., :1], DATES, *stored)
    sample = NumpySeries(tmp_path, layout="TCHW")[0]
    assert np.array_equal(sample["valid"].numpy(), valid[BY_DATE])
    assert np.array_equal(sample["mask"].numpy(), mask[BY_DATE])


def test_validity_of_whole_dates(tmp_path):
    write_numpy(tmp_path, frames(4), DATES, np.array([True, False, True, True]))
    valid = NumpySeries(tmp_path)[0]["valid"]
    assert valid.shape == (4, 40, 50) and valid.all((1, 2)).tolist() == [True, False, True, True]
    assert not valid[1].any()


def test_select_tiles_and_nan(tmp_path):
    pixels = frames(4, dtype="float32")
    pixels[1, 2, 20, 30] = np.nan
    write_numpy(tmp_path, pixels, DATES)
    data = NumpySeries(tmp_path, bands=["R", "G", "B"], select=["B", "R"], tile=16)
    for i in range(len(data)):
        row, col = data[i]["window"]
        expected = np.nan_to_num(pixels[BY_DATE][:, [2, 0], row : row + 16, col : col + 16])
        assert np.array_equal(data[i]["image"].numpy(), expected)
    assert sum(data.nonfinite(i).sum() for i in range(len(data))) > 0
    without = NumpySeries(tmp_path, bands=["R", "G", "B"], select=["G"])
    assert without[0]["valid"].all() and without.nonfinite(0).sum() == 0


@pytest.mark.parametrize("nodata, dtype", [(0, "uint16"), (-9999, "float32"), (np.nan, "float64")])
def test_nodata(tmp_path, nodata, dtype):
    pixels = frames(4, dtype=dtype)
    pixels[0, 1, 3:9, 4] = pixels[2, 0, 5, 6] = nodata
    clear = np.ones((4, 40, 50), bool)
    clear[3, :, 7] = False
    write_numpy(tmp_path, pixels, DATES, clear)
    data = NumpySeries(tmp_path, select=["band1", "band2"], nodata=nodata)
    assert data.nodata == (None if np.isnan(nodata) else nodata)
    sample, held = data[0], pixels[BY_DATE][:, :2]
    missing = np.isnan(held) if np.isnan(nodata) else held == nodata
    assert missing.sum() == 7
    assert (sample["valid"].numpy() == clear[BY_DATE] & ~missing.any(1)).all()
    assert (sample["image"].numpy() == np.where(missing, 0, held)).all()
    assert data.nonfinite(0).sum() == 0
    valid = NumpySeries(tmp_path, select=["band3"], nodata=nodata)[0]["valid"]
    assert (valid.numpy() == clear[BY_DATE]).all()


@pytest.mark.parametrize("nodata", [-9999, 256, 0.5])
def test_nodata_that_no_pixel_can_be(tmp_path, nodata):
    write_numpy(tmp_path, frames(2, dtype="uint8"), DATES[:2])
    with pytest.raises(ValueError, match="nodata: is .* which pixels of uint8 never are"):
        NumpySeries(tmp_path, nodata=nodata)
    assert NumpySeries(tmp_path, nodata=np.nan)[0]["valid"].all()


STATED = {
    "bands": ["R", "G", "B"], "units": "reflectance", "scale": [1.0, 2.0, 3.0],
    "offset": 0.5, "classes": ["land", "water"],
}  # fmt: skip


def test_description_in_the_folder(tmp_path):
    write_numpy(tmp_path / "a", frames(4), DATES)
    (tmp_path / "config.json").write_text(json.dumps(STATED))
    data = open_series(tmp_path, select=["B", "R"])
    assert data.bands == ("B", "R") and data.units == "reflectance"
    assert data.scale.tolist() == [3, 1] and data.offset.tolist() == [0.5, 0.5]
    assert data.classes == ("land", "water")
    data = NumpySeries(
        tmp_path, bands=["x", "y", "z"], units="dB", scale=7.0, offset=0.0, labels=open_water
    )
    assert data.bands == ("x", "y", "z") and data.units == "dB" and data.classes == ()
    assert data.scale.tolist() == [7] * 3 and data.offset.tolist() == [0] * 3


@pytest.mark.parametrize("other", [{"bands": ["R", "G", "B"]}, [1, 2], {"model": "UNet"}])
def test_description_of_another_program(tmp_path, other):
    write_numpy(tmp_path, frames(4), DATES)
    (tmp_path / "config.json").write_text(json.dumps(other))
    data = NumpySeries(tmp_path)
    assert data.bands == ("band1", "band2", "band3") and data.units == "DN" and data.classes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0]}, "scale: must be one finite number"),
        ({"scale": "large"}, "must be JSON with bands, units"),
        ({"bands": 3}, "must be JSON with bands, units"),
        ({"bands": ["R", "G"], "scale": 1}, "describes the bands .'R', 'G'., .*series.npy has 3"),
    ],
)
def test_bad_descriptions(tmp_path, change, message):
    write_numpy(tmp_path, frames(4), DATES)
    (tmp_path / "config.json").write_text(json.dumps(STATED | change))
    with pytest.raises(DataError, match=f"config.json: .*{message}.*mend the file or remove it"):
        NumpySeries(tmp_path, bands=["R", "G", "B"])


@pytest.mark.parametrize("path", [".", "series.npy", "../here/series.npy"])
def test_names_of_paths_seen_from_within(tmp_path, monkeypatch, path):
    write_numpy(tmp_path / "here", frames(4), DATES)
    monkeypatch.chdir(tmp_path / "here")
    assert NumpySeries(path)[0]["name"] == "here"


@pytest.mark.parametrize("dtype", [">u2", ">i2", ">f4", "<u2"])
def test_orders_of_bytes(tmp_path, dtype):
    pixels = frames(4)
    write_numpy(tmp_path, pixels.astype(dtype), DATES)
    data = NumpySeries(tmp_path)
    validate_sample(data[0], data.bands)
    assert data[0]["image"].dtype == (torch.uint16 if "u2" in dtype else torch.float32)
    assert np.array_equal(data[0]["image"].numpy(), pixels[BY_DATE])


def test_numbers_beyond_float32_are_not_valid(tmp_path):
    pixels = frames(4, dtype="float64")
    pixels[1, 2, 20, 30], pixels[2, 0, 3, 4] = -1e300, 3e38
    write_numpy(tmp_path, pixels, DATES)
    data = NumpySeries(tmp_path)
    sample = data[0]
    validate_sample(sample, data.bands)
    assert (~sample["valid"]).nonzero().tolist() == [[BY_DATE.index(1), 20, 30]]
    assert data.nonfinite(0).tolist() == (~sample["valid"]).sum((1, 2)).tolist()


def test_folders_and_workers(tmp_path):
    for name in "bac":
        write_numpy(tmp_path / name, frames(4, seed=ord(name)), DATES, *companions(ord(name)))
    data = open_series(tmp_path, tile=(40, 25))
    assert [s.name for s in data.series] == ["a", "b", "c"] and isinstance(data, NumpySeries)
    expected = [data[i] for i in range(6)]
    assert np.array_equal(expected[2]["image"], frames(4, seed=ord("b"))[BY_DATE][..., :25])
    for cache in (False, True):
        data = NumpySeries(tmp_path, tile=(40, 25), cache=cache)
        for workers in (0, 1, 2):
            loader = DataLoader(data, batch_size=None, num_workers=workers)
            for got, want in zip(loader, expected, strict=True):
                assert all(torch.equal(got[k], want[k]) for k in ("image", "valid", "mask"))


@pytest.mark.parametrize(
    ("shape", "bands", "layout"),
    [
        ((4, 3, 40, 50), None, "TCHW"),
        ((4, 40, 50, 3), None, "THWC"),
        ((4, 8, 8, 9), list("abcdefghi"), "THWC"),
        ((4, 9, 8, 8), list("abcdefghi"), "TCHW"),
    ],
)
def test_layout_is_told_apart(tmp_path, shape, bands, layout):
    write_numpy(tmp_path, np.ones(shape, "uint8"), DATES)
    wanted = shape if layout == "TCHW" else tuple(np.array(shape)[[0, 3, 1, 2]])
    assert NumpySeries(tmp_path, bands=bands)[0]["image"].shape == wanted


def test_layout_that_cannot_be_told_apart(tmp_path):
    write_numpy(tmp_path, np.ones((4, 10, 8, 9), "uint8"), DATES)
    with pytest.raises(DataError, match=r'series.npy: shape \(4, 10, 8, 9\).*layout="TCHW"'):
        NumpySeries(tmp_path)
    assert NumpySeries(tmp_path, layout="TCHW")[0]["image"].shape == (4, 10, 8, 9)
    np.save(tmp_path / "valid.npy", np.ones((4, 8, 9), bool))
    assert NumpySeries(tmp_path)[0]["image"].shape == (4, 10, 8, 9)
    with pytest.raises(ValueError, match='layout: must be "TCHW", "THWC" or "auto", got \'CTHW\''):
        NumpySeries(tmp_path, layout="CTHW")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}, None]), "cannot be read as a plain NumPy array.*no objects"),
        (np.ones((4, 40, 50)), r"must be \(T, C, H, W\).*\(4, 40, 50\).*array\[:, None\]"),
        (np.ones((0, 3, 40, 50)), r"must be .* nothing empty, has shape \(0, 3, 40, 50\)"),
        (np.ones((4, 3, 40, 50), complex), "pixels of type complex128 are not supported"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    write_numpy(tmp_path, array, DATES)
    with pytest.raises(DataError, match="series.npy: " + message):
        NumpySeries(tmp_path)


def test_truncated_and_missing(tmp_path):
    write_numpy(tmp_path, frames(4), DATES)
    path = tmp_path / "series.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="series.npy: cannot be read.*complete .npy"):
        NumpySeries(tmp_path)
    with pytest.raises(DataError, match="other.npy: cannot be read"):
        NumpySeries(tmp_path / "other.npy")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="sub: is empty; it must hold series.npy with dates.json"):
        NumpySeries(tmp_path / "sub")


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (DATES[:3], r"dates.json: lists 3 dates, .*series.npy has 4 frames"),
        ([*DATES[:3], "2021-07-01"], "dates.json entry 3 and .*dates.json entry 4 have the same"),
        ([*DATES[:3], "spring"], "dates.json: entry 4: 'spring' is none of YYYY"),
    ],
)
def test_bad_dates(tmp_path, dates, message):
    write_numpy(tmp_path, frames(4), dates)
    with pytest.raises(DataError, match=message):
        NumpySeries(tmp_path)


def test_no_dates(tmp_path):
    write_numpy(tmp_path, frames(4), DATES)
    (tmp_path / "dates.json").rename(tmp_path / "when.json")
    with pytest.raises(DataError, match="series.npy: no dates.json .* lies beside it.*dates="):
        NumpySeries(tmp_path)
    with pytest.raises(DataError, match="then.json: does not exist; it must lie beside series.npy"):
        NumpySeries(tmp_path, dates="then.json")
    assert len(NumpySeries(tmp_path, dates="when.json")) == 1


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("valid", np.ones((3, 40, 50), bool), r"valid.npy: must be .*\(4, 40, 50\) or \(4,\)"),
        ("valid", np.ones((4, 40, 50)), r"valid.npy: must be integers or bool.*got float64"),
        ("mask", np.ones((50, 40), int), r"mask.npy: must be .*\(40, 50\) or .*got int64 \(50, 40"),
        ("mask", np.full((40, 50), 256), r"labels must be in 0 ... 254.*256 ... 256; renumber"),
        ("mask", np.full((40, 50), -1), r"labels must be in 0 ... 254.*-1 ... -1; renumber"),
    ],
)
def test_bad_companions(tmp_path, name, array, message):
    write_numpy(tmp_path, frames(4), DATES, **{name: array})
    with pytest.raises(DataError, match=message):
        NumpySeries(tmp_path, layout="TCHW")[0]


def test_bands_that_do_not_fit(tmp_path):
    write_numpy(tmp_path, frames(4), DATES)
    with pytest.raises(DataError, match="bands: must name all 3 bands of .*series.npy.*select="):
        NumpySeries(tmp_path, bands=["R", "G"])
    write_numpy(tmp_path / "x" / "a", frames(4), DATES)
    write_numpy(tmp_path / "x" / "b", frames(4, bands=4), DATES)
    with pytest.raises(
        DataError, match="b/series.npy: has 4 bands of uint16, .*a/series.npy has 3"
    ):
        NumpySeries(tmp_path / "x")


def test_slovenian_scenes(data_root):
    folder = data_root / "slovenia_sentinel2"
    bands = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split()
    data = NumpySeries(
        folder / "scenes.npy",
        dates="scene_dates.json",
        mask="lulc.npy",
        bands=bands,
        units="reflectance",
        ignore_label=0,
    )
    sample = data[0]
    validate_sample(sample, tuple(bands))
    listed = json.loads((folder / "scene_dates.json").read_text())
    assert listed != sorted(listed)
    stored = np.load(folder / "scenes.npy")
    for day, frame in zip(sample["dates"], sample["image"]):
        at = listed.index(str(np.datetime64(int(day), "D")))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), stored[at])
    # The two cloudy days are the bright ones.
    bright = sample["image"][:, bands.index("B02")].mean((1, 2)).argsort()[-2:].sort().values
    assert [str(np.datetime64(int(sample["dates"][i]), "D")) for i in bright] == [
        "2015-07-31",
        "2015-08-20",
    ]
    assert sample["mask"].unique().tolist() == [1, 2, 3, 4, 8, 255]


def test_slovenian_index_series(data_root):
    data = NumpySeries(
        data_root / "slovenia_sentinel2" / "ndvi.npy",
        dates="ndvi_timestamps.json",
        valid="cloud_mask.npy",
        invalid_where=1,
        mask="lulc.npy",
        bands=["NDVI"],
    )
    sample = data[0]
    validate_sample(sample, ("NDVI",))
    assert sample["image"].shape == (68, 1, 101, 100)
    assert sample["valid"].float().mean() == pytest.approx(0.60, abs=0.01)
    assert (sample["dates"].diff() == 0).sum() == 1  # two orbits on 2015-12-08
    image, valid = sample["image"][:, 0], sample["valid"]
    assert image[valid].mean() > image[~valid].mean() + 0.2  # clouds hide the green
