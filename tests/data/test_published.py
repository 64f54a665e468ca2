import pickle
import re

import numpy as np
import pytest
import torch

from tests.data.corpora import DATES, scene, write_published_layout
from timo.cli.build import build_pretraining
from timo.data import (
    DataError,
    PublishedCorpus,
    StoreSeries,
    locations,
    open_series,
    published,
    validate_sample,
)
from timo.data.building import SeriesSource, build_store
from timo.data.published import write_published


@pytest.fixture
def layout(tmp_path):
    return write_published_layout(tmp_path / "in", locations=3)


def test_read_as_it_is(layout):
    series = open_series(layout)
    assert isinstance(series, PublishedCorpus) and len(series) == 3
    assert series.bands == ("B04", "B03", "B02")
    for index in range(3):
        sample = series[index]
        validate_sample(sample, series.bands)
        assert sample["name"] == f"{index:06d}"
        expected = np.stack([scene(100 * index + k, 24) for k in range(10)])
        assert np.array_equal(sample["image"], expected)
        days = sample["dates"].numpy().astype("datetime64[D]").astype(str)
        assert [day.replace("-", "") for day in days] == DATES[:10]
    assert len(open_series(layout / "dates.csv")) == 3


def test_frames_are_sorted_by_date_and_pixels_without_data_are_not_valid(layout):
    lines = (layout / "dates.csv").read_text().splitlines()
    loc, *dates = lines[2].split(",")
    stamped = [f"{date}T101031_{date}T101026_T32TQM" for date in dates[::-1]]
    lines[2] = ",".join([loc, *stamped])
    (layout / "dates.csv").write_text("\n".join(lines))
    pixels = np.load(layout / "000001.npy")
    pixels[4, :, 3, 5] = 0
    np.save(layout / "000001.npy", pixels)
    series = PublishedCorpus(layout, tile=24, dates=10)
    sample = series[1]
    assert np.array_equal(sample["image"], pixels[::-1]) and (sample["dates"].diff() > 0).all()
    assert (~sample["valid"]).nonzero().tolist() == [[5, 3, 5]]
    assert torch.equal(series.batch([0, 1])["image"][1], sample["image"])


@pytest.mark.parametrize("form", [r"\1-\2-\3", r"\1_\2_\3", r"\1_\2_\3_S2", r"\1-\2-\3T10:11:12Z"])
def test_every_form_of_a_date(layout, form):
    days = [sample["dates"] for sample in PublishedCorpus(layout)]
    table = layout / "dates.csv"
    text = re.sub(r"(\d{4})(\d{2})(\d{2})", form, table.read_text())
    table.write_text("\ufeff" + text, encoding="utf-8")  # as spreadsheets begin a file
    for sample, expected in zip(PublishedCorpus(layout), days, strict=True):
        assert torch.equal(sample["dates"], expected)


def test_written_and_read_again(layout, tmp_path):
    build_store(SeriesSource(PublishedCorpus(layout)), tmp_path / "store")
    write_published(StoreSeries(tmp_path / "store"), tmp_path / "out")
    for a, b in zip(PublishedCorpus(layout), PublishedCorpus(tmp_path / "out"), strict=True):
        assert a["name"] == b["name"]
        assert all(torch.equal(a[key], b[key]) for key in ("image", "dates", "valid"))
    header, row, *_ = (tmp_path / "out/dates.csv").read_text().splitlines()
    assert header == "loc,t1,t2,t3,t4,t5,t6,t7,t8,t9,t10" and row.startswith("000000,20160105,")


def test_what_is_written_stays(layout, tmp_path, monkeypatch):
    build_store(SeriesSource(PublishedCorpus(layout)), tmp_path / "store")
    store, out = StoreSeries(tmp_path / "store"), tmp_path / "deep" / "out"

    def fail(path, array):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(np, "save", fail)
        write_published(store, out)
    assert list(out.parent.iterdir()) == []
    killed = out.parent / ".out.partial"  # what is left after a power cut
    killed.mkdir()
    (killed / "000007.npy").touch()
    write_published(store, out)
    assert list(out.parent.iterdir()) == [out] and len(list(out.iterdir())) == 4
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    write_published(store, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "000002.npy").unlink()
    with pytest.raises(DataError, match="out: exists and is not an empty folder"):
        write_published(store, out)
    build_store(SeriesSource(PublishedCorpus(layout)), tmp_path / "fewer", dates=9)
    with pytest.raises(DataError, match="in: exists and is not an empty folder"):
        write_published(StoreSeries(tmp_path / "fewer"), layout)


def test_the_same_command_again(layout, tmp_path, capsys):
    arguments = ["--source", "published", "--root", str(layout), "--out", str(tmp_path / "store")]
    arguments += ["--published", str(tmp_path / "out"), "--size", "24", "--workers", "0"]
    for _ in range(2):
        assert build_pretraining(arguments) == 0
        assert f"the published layout is {tmp_path / 'out'}" in capsys.readouterr().out


def test_maps_are_bounded_and_arrays_are_not_reopened(layout, monkeypatch):
    lines = (layout / "dates.csv").read_text().splitlines()
    lines[2] = ",".join(["1", *DATES[9::-1]])  # frames out of order stay on disk as they are
    (layout / "dates.csv").write_text("\n".join(lines))
    monkeypatch.setattr(locations, "MOST_MAPS", 2)
    opened = []
    real = published.load_array
    monkeypatch.setattr(published, "load_array", lambda path: opened.append(path) or real(path))
    series = PublishedCorpus(layout)
    opened.clear()
    expected = [series[index]["image"] for index in (0, 1, 0, 1)]
    assert len(opened) == 2 and torch.equal(expected[1], expected[3])
    series[0], series[2], series[0]
    assert len(opened) == 3 and len(series._maps) == 2  # 2 took the place of 1
    assert not pickle.loads(pickle.dumps(series))._maps


def rewrite(table, old, new):
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("loc,t1", "name,t1", "first line must be loc,t1,t2"),
        ("\n2,", "\n../../etc/passwd,", "row 4: loc '../../etc/passwd' is no name"),
        ("\n2,", "\n/etc/passwd,", "row 4: loc '/etc/passwd' is no name"),
        ("\n2,", "\n..,", "row 4: loc '..' is no name"),
        ("\n2,", "\n1,", "row 4: location 000001 occurs twice"),
        ("\n2,", "\n7,", "1 of the 3 arrays that dates.csv lists are missing, 000007.npy"),
        ("\n2,20160105,", "\n2,", "row 4: must hold a location and 10 dates"),
        ("\n2,20160105,", "\n2,,", "row 4: must hold a location and 10 dates"),
    ],
)
def test_bad_tables(layout, old, new, message):
    rewrite(layout / "dates.csv", old, new)
    with pytest.raises(DataError, match=message):
        PublishedCorpus(layout)


def test_bad_dates_are_named_when_read(layout):
    rewrite(layout / "dates.csv", "\n2,20160105,", "\n2,someday,")
    series = PublishedCorpus(layout)
    with pytest.raises(DataError, match="location 000002: 'someday' is none of"):
        series[2]


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((10, 3, 24, 24), "uint16"), "holds uint16 .* the first location uint8"),
        (np.zeros((9, 3, 24, 24), "uint8"), r"holds uint8 \(9, 3, 24, 24\)"),
        (np.array([{"a": 1}] * 3, object), "cannot be read as a plain NumPy array"),
    ],
)
def test_bad_arrays(layout, array, message):
    np.save(layout / "000002.npy", array, allow_pickle=True)
    series = PublishedCorpus(layout)
    with pytest.raises(DataError, match=message):
        series[2]


class Hostile:
    ran = False

    def __reduce__(self):
        return exec, ("import tests.data.test_published as t; t.Hostile.ran = True",)


def test_hostile_pickles_are_not_run(layout):
    for name in ("000000.npy", "000002.npy"):
        content = (layout / name).read_bytes()
        np.save(layout / name, np.array([Hostile()], object), allow_pickle=True)
        with pytest.raises(DataError, match="cannot be read as a plain NumPy array"):
            PublishedCorpus(layout)[2]
        (layout / name).write_bytes(content)
    assert not Hostile.ran


def test_truncated_array_in_a_build_is_a_counted_rejection(layout, tmp_path):
    content = (layout / "000001.npy").read_bytes()
    (layout / "000001.npy").write_bytes(content[: len(content) // 2])
    report = build_store(SeriesSource(PublishedCorpus(layout)), tmp_path / "store")
    assert report["locations"] == {"candidates": 3, "accepted": 2, "unreadable": 1}
    assert "000001.npy: cannot be read" in (tmp_path / "store/rejected.csv").read_text()
