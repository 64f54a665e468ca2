import re

import numpy as np
import pytest
import torch

from tests.data.writers import frames, write_numpy, write_rasters, write_tif
from timo.data import DataError, NumpySeries, RasterSeries, check_dataset, open_water

YEARS = ["2001", "2002", "2003"]


def texts(report, severity):
    return [f"{p.where}: {p.text}" for p in report.problems if p.severity == severity]


def test_a_sound_dataset(tmp_path):
    write_rasters(tmp_path, YEARS, frames(3, dtype="uint8"), descriptions=("Red", "NIR", "Green"))
    mask = np.zeros((40, 50), "uint8")
    mask[:10] = 4
    write_tif(tmp_path / "mask.tif", mask)
    report = check_dataset(RasterSeries(tmp_path, units="stretched"), tmp_path / "check.html")
    assert report.ok and not report.problems
    assert report.labels == {0: 1500, 4: 500}
    facts = report.samples[0]
    assert facts.shape == (3, 3, 40, 50) and facts.valid == [1, 1, 1]
    assert facts.dates == ["2001-07-01", "2002-07-01", "2003-07-01"]
    page = (tmp_path / "check.html").read_text()
    assert "No errors found" in page and page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing outside the page
    assert "2001-07-01" in page and "75.00%" in page
    assert "4: 500" in str(report) and str(report).endswith("ok")


def test_what_is_wrong_is_found(tmp_path):
    pixels = frames(4, dtype="float32")
    pixels[1] = pixels[0]
    pixels[2] = np.nan
    pixels[:, 1] = np.where(np.isnan(pixels[:, 1]), np.nan, 5)
    write_rasters(tmp_path, ["2001", "2002", "2003", "20030708"], pixels)
    report = check_dataset(RasterSeries(tmp_path))
    name = tmp_path.name
    assert texts(report, "warning") == [
        f"{name}: no pixel is valid on 2003-07-01",
        f"{name} on 2002-07-01: the frame is identical to {name} on 2001-07-01",
        f"{name}: 2000 pixels are NaN or infinite and count as not valid: 2003-07-01 (2000)",
        f"{name}: band band2 is 5 everywhere",
    ]
    assert report.ok and report.samples[0].nonfinite == [0, 0, 2000, 0]


def test_series_that_are_not_labelled_alike(tmp_path):
    for name in "abc":
        write_rasters(tmp_path / name, YEARS, frames(3, dtype="uint8") + np.uint8(1))
    mask = np.zeros((40, 50), "uint8")
    write_tif(tmp_path / "a" / "mask.tif", mask)
    for year in YEARS:
        write_tif(tmp_path / "c" / f"{year}_mask.tif", mask)
    report = check_dataset(RasterSeries(tmp_path, samples=["a", "c"]))
    told = "labels: samples are not labelled alike: a has a mask, c has masks of dates"
    assert told in texts(report, "warning")
    report = check_dataset(RasterSeries(tmp_path))
    told = told.replace("c has", "b has no labels, c has")
    assert told in texts(report, "warning")
    assert "alike" not in str(check_dataset(RasterSeries(tmp_path, samples=["a"])))


def test_pixels_that_look_as_if_they_had_no_data(tmp_path):
    pixels = frames(2, bands=2, dtype="uint8") + np.uint8(1)
    pixels[0, :, :4, :5] = 0
    pixels[1, 0] = 0  # one band of two
    pixels[1, 1] = np.maximum(pixels[1, 1], 1)
    write_rasters(tmp_path, YEARS[:2], pixels)
    (warning, *_) = texts(check_dataset(RasterSeries(tmp_path)), "warning")
    assert warning == (
        f"{tmp_path.name}: 0.5% of the valid pixels are 0 in every band; if nothing was measured "
        "there, state nodata=0"
    )
    assert "every band" not in str(check_dataset(RasterSeries(tmp_path, nodata=0)))


def test_all_invalid_and_single_date(tmp_path):
    write_rasters(tmp_path, ["2001"], np.zeros((1, 2, 40, 50), "uint8"), nodata=0)
    write_tif(tmp_path / "mask.tif", np.full((40, 50), 255, "uint8"))
    report = check_dataset(RasterSeries(tmp_path), tmp_path / "check.html")
    assert not report.ok and "not ok" in str(report)
    assert "no pixel is valid on any date; check nodata" in texts(report, "error")[0]
    assert len(texts(report, "warning")) == 2  # a single date, every label ignored
    assert "Errors found" in (tmp_path / "check.html").read_text()


def test_unreadable_samples_are_reported_and_the_rest_looked_at(tmp_path):
    for name in "ab":
        write_rasters(tmp_path / name, YEARS, frames(3, seed=ord(name)))
    data = RasterSeries(tmp_path)
    (tmp_path / "a" / "2002.tif").write_bytes(b"")
    report = check_dataset(data, tmp_path / "check.html")
    assert not report.ok and [facts.name for facts in report.samples] == ["b"]
    assert re.search(r"sample 0: .*a/2002.tif: cannot be read", texts(report, "error")[0])


def test_labels_that_cannot_be_made_are_reported(tmp_path):
    write_rasters(tmp_path, YEARS, frames(3))
    report = check_dataset(RasterSeries(tmp_path, labels=lambda image, valid, bands: image))
    assert "labels: must return int64" in texts(report, "error")[0]


def test_a_dataset_that_breaks_the_contract(tmp_path):
    class Wrong(RasterSeries):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"dates": torch.tensor([3, 2, 1])}

    write_rasters(tmp_path, YEARS, frames(3))
    report = check_dataset(Wrong(tmp_path))
    assert "dates must be ascending, got [3, 2, 1]" in texts(report, "error")[0]


@pytest.mark.parametrize(
    ("scale", "severity", "message"),
    [
        (1.0, "error", "look like digital numbers: state scale= and offset="),
        (0.01, "warning", "of reflectances lie outside"),
        (1e-3, None, ""),
    ],
)
def test_reflectance_out_of_range(tmp_path, scale, severity, message):
    write_rasters(tmp_path, YEARS, frames(3))
    report = check_dataset(RasterSeries(tmp_path, units="reflectance", scale=scale))
    assert [p.severity for p in report.problems] == ([severity] if severity else [])
    assert message in "".join(p.text for p in report.problems)


def test_gaps_and_double_days(tmp_path):
    dates = ["2020-01-01", "2020-01-11", "2020-01-21T10:00:00", "2020-01-21T12:00:00", "2020-08-01"]
    write_numpy(tmp_path, frames(5), dates)
    notes = texts(check_dataset(NumpySeries(tmp_path)), "note")
    assert "longest gap 193 days after 2020-01-21, median 10" in notes[0]
    assert "two frames on 2020-01-21" in notes[1]
    assert "values are digital numbers" in notes[2]


def test_how_many_samples(tmp_path):
    write_rasters(tmp_path, YEARS, frames(3))
    report = check_dataset(RasterSeries(tmp_path, tile=8), max_samples=4)
    assert len(report.samples) == 4 and report.total == 35
    assert report.samples[-1].name.endswith("[32, 42]")


def test_page_into_a_missing_folder(tmp_path):
    write_rasters(tmp_path, YEARS, frames(3))
    with pytest.raises(DataError, match="its folder does not exist; create"):
        check_dataset(RasterSeries(tmp_path), tmp_path / "none" / "check.html")


def test_names_are_escaped(tmp_path):
    write_rasters(tmp_path / "<b>&", YEARS, frames(3))
    check_dataset(RasterSeries(tmp_path), tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text()
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_pucallpa(data_root, tmp_path):
    data = RasterSeries(
        data_root / "pucallpa_landsat", bands=("SWIR1", "NIR", "Red", "Green"), labels=open_water
    )
    report = check_dataset(data, tmp_path / "check.html")
    assert report.ok and set(report.labels) == {0, 1, 255}
    assert (tmp_path / "check.html").read_text().count("data:image/png;base64,") == 2


def test_thumbnails_are_stretched_by_what_is_valid(tmp_path):
    """Clouds on every date do not darken the ground; bands are known by name in any case."""
    pixels = frames(3, bands=3, dtype="uint16")
    pixels[:, :, :, :30] = 60_000
    descriptions = ["blue", "green", "red"]
    write_rasters(tmp_path, ["2001", "2002", "2003"], pixels, descriptions=descriptions)
    valid = np.ones((40, 50), np.uint8)
    valid[:, :30] = 0
    for name in ("2001", "2002", "2003"):
        write_tif(tmp_path / f"{name}_valid.tif", valid)
    shown = check_dataset(RasterSeries(tmp_path)).samples[0].thumbnails[0][:, 30:]
    assert 0.3 < shown.mean() < 0.7
    red = pixels[0, 2, :, 30:].astype(float)
    assert np.corrcoef(shown[..., 0].ravel(), red.ravel())[0, 1] > 0.95
