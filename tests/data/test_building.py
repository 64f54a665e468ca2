import os
import pickle
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpora import (
    DATES,
    rejections,
    scene,
    write_published_layout,
    write_seco,
)
from tests.data.writers import TRANSFORM, Affine, frames, write_rasters, write_tif
from timo.data import (
    DataError,
    PublishedCorpus,
    SimulatedSeries,
    StoreSeries,
    check_dataset,
    open_series,
    validate_sample,
)
from timo.data.building import RasterSource, SecoSource, SeriesSource, build_store, builder
from timo.data.building.choose import spread


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def seco_folder(root: Path, location: int, at: int) -> Path:
    return sorted((root / f"{location:06d}").iterdir())[at]


def test_seco_layout(tmp_path):
    root = write_seco(tmp_path / "seco", locations=3)
    report = build_store(SecoSource(root, 24, None), tmp_path / "store")
    assert report["locations"] == {"candidates": 3, "accepted": 3}
    assert report["scenes"] == {"candidates": 36, "accepted": 30, "not chosen": 6}
    store = StoreSeries(tmp_path / "store")
    assert store.bands == ("B04", "B03", "B02") and store.verify() == []
    for index, row in enumerate(store.table.to_pylist()):
        sample = store[index]
        validate_sample(sample, store.bands)
        assert sample["name"] == f"{index:06d}"
        days = sample["dates"].numpy().astype("datetime64[D]")
        for frame, day, source in zip(sample["image"], days, row["source"]):
            at = DATES.index(str(day).replace("-", ""))
            assert np.array_equal(frame.numpy(), scene(100 * index + at, 24))
            assert source.startswith(DATES[at])
        assert row["longitude"] == pytest.approx(-74.9989, abs=1e-3)
        assert row["latitude"] == pytest.approx(-9.0476, abs=1e-3)


def test_larger_scenes_are_cut_at_their_centre_and_coarse_bands_repeated(tmp_path):
    root = write_seco(tmp_path / "seco", locations=1, size=32, dates=DATES[:2])
    for k in range(2):
        folder = seco_folder(root, 0, k)
        write_tif(folder / "B5.tif", scene(7 + k, 16, 1), transform=TRANSFORM @ Affine.scale(2))
    build_store(SecoSource(root, 24, ["B04", "B05"]), tmp_path / "store", dates=2)
    image = StoreSeries(tmp_path / "store")[0]["image"].numpy()
    assert np.array_equal(image[0, 0], scene(0, 32)[0, 4:28, 4:28])
    assert np.array_equal(image[1, 1], scene(8, 16, 1)[0].repeat(2, 0).repeat(2, 1)[4:28, 4:28])


def spoil_seco(root: Path) -> dict[str, int]:
    """Spoil scenes of location 0 that has 14 dates; how many rejections each reason must get."""
    (seco_folder(root, 0, 0) / "B3.tif").write_bytes(b"II*\0 no raster")
    (seco_folder(root, 0, 1) / "B2.tif").unlink()
    whole = (seco_folder(root, 0, 2) / "B4.tif").read_bytes()
    (seco_folder(root, 0, 2) / "B4.tif").write_bytes(whole[: len(whole) // 2])
    write_tif(seco_folder(root, 0, 3) / "B4.tif", scene(1, 24, 1, "uint16"))
    write_tif(seco_folder(root, 0, 4) / "B4.tif", scene(1, 24, 2))
    for band in ("B4", "B3", "B2"):
        write_tif(seco_folder(root, 0, 5) / f"{band}.tif", scene(1, 20, 1))
        write_tif(
            seco_folder(root, 0, 6) / f"{band}.tif", scene(1, 24, 1),
            transform=TRANSFORM @ Affine.translation(3, 0),
        )  # fmt: skip
        write_tif(seco_folder(root, 0, 7) / f"{band}.tif", np.full((24, 24), 9, "uint8"))
        half = scene(1, 24, 1)
        half[:, :12] = 0
        write_tif(seco_folder(root, 0, 8) / f"{band}.tif", half)
        bright = scene(1, 24, 1)
        bright[:, :16] = 240
        write_tif(seco_folder(root, 0, 9) / f"{band}.tif", bright)
        double = (seco_folder(root, 0, 11) / f"{band}.tif").read_bytes()
        (seco_folder(root, 0, 10) / f"{band}.tif").write_bytes(double)
    os.rename(seco_folder(root, 0, 12), root / "000000" / "no_date_here")
    return {
        "unreadable": 2, "missing file": 1, "wrong type": 1, "wrong bands": 1, "wrong size": 1,
        "other grid": 1, "blank": 1, "nodata": 1, "cloud": 1, "duplicate pixels": 1, "no date": 1,
    }  # fmt: skip


def test_every_bad_scene_is_counted_and_logged(tmp_path):
    dates = [f"201{k // 4}{1 + 3 * (k % 4):02d}15" for k in range(16)]
    root = write_seco(tmp_path / "seco", locations=2, dates=dates)
    expected = spoil_seco(root)
    report = build_store(SecoSource(root, 24, None), tmp_path / "store", dates=4)
    counts = report["scenes"]
    assert {k: v for k, v in counts.items() if k in expected} == expected
    assert counts["candidates"] == 32 and counts["accepted"] == 8
    assert sum(counts.values()) - counts["candidates"] == 32
    log = rejections(tmp_path / "store")
    assert len(log) == sum(expected.values()) and {row["location"] for row in log} == {"000000"}
    for row in log:
        assert row["reason"] in expected and row["scene"] and row["detail"]
    assert StoreSeries(tmp_path / "store").verify() == []


def test_locations_without_enough_dates(tmp_path):
    root = write_seco(tmp_path / "seco", locations=2, dates=DATES[:3])
    write_seco(tmp_path / "seco", locations=1)
    (root / "000005").mkdir()
    report = build_store(SecoSource(root, 24, None), tmp_path / "store", dates=4)
    assert report["locations"] == {"candidates": 3, "accepted": 1, "too few dates": 2}
    few = [row for row in rejections(tmp_path / "store") if row["reason"] == "too few dates"]
    assert [row["location"] for row in few] == ["000001", "000005"]
    assert few[0]["detail"] == "3 usable dates, 4 are needed"
    with pytest.raises(DataError, match="none of the 3 locations was accepted.*rejected.csv"):
        build_store(SecoSource(root, 24, None), tmp_path / "none", dates=13)
    assert not (tmp_path / "none" / "store.json").exists()


def test_simulated_series(tmp_path):
    series = SimulatedSeries(
        3, size=32, dates=14, output="DN", target=None, cloud_fraction=0.2, missing=0.2
    )
    report = build_store(SeriesSource(series), tmp_path / "store", dates=5)
    assert report["locations"]["accepted"] == 3
    store = StoreSeries(tmp_path / "store")
    assert store.units == "reflectance" and store.scale.tolist() == pytest.approx([1e-4] * 4)
    for index, row in enumerate(store.table.to_pylist()):
        whole, sample = series[index], store[index]
        at = [int(source.split("/")[1]) for source in row["source"]]
        assert np.array_equal(sample["valid"], whole["valid"][at])
        expected = whole["image"][at].int() * whole["valid"][at][:, None]
        assert np.array_equal(sample["image"], expected)


def test_dates_spread_over_seasons_and_years_and_avoid_clouds():
    days = np.arange(16801, 16801 + 5 * 365, 10)
    clear = np.ones(len(days))
    clear[::3] = 0.2
    chosen = spread(days.tolist(), clear.tolist(), 10)
    assert chosen == sorted(set(chosen)) and len(chosen) == 10
    assert clear[chosen].min() == 1
    picked = days[chosen]
    assert len({day // 365 for day in picked - days[0]}) == 5  # every year
    assert len({(day - days[0]) % 365 // 91 for day in picked}) >= 4  # every season
    # Ten dates drawn blindly leave gaps twice as long.
    assert np.diff(picked).max() < 420


def test_of_two_scenes_of_a_day_the_clearer_stays(tmp_path):
    root = write_seco(tmp_path / "seco", locations=1, dates=DATES[:2])
    clear = seco_folder(root, 0, 0)
    for band in ("B4", "B3", "B2"):
        plane = scene(77, 24, 1)
        plane[:, :3] = 0
        later = clear.with_name(clear.name.replace("T101031_", "T102031_"))
        write_tif(later / f"{band}.tif", plane)
    report = build_store(SecoSource(root, 24, None), tmp_path / "store", dates=2)
    assert report["scenes"]["duplicate date"] == 1
    assert rejections(tmp_path / "store")[0]["scene"] == later.name


@pytest.fixture
def shuffled_listing(monkeypatch):
    """Folders are listed in an order that differs from call to call."""
    rng = np.random.default_rng(0)
    real = Path.iterdir

    def iterdir(self):
        found = list(real(self))
        return iter([found[i] for i in rng.permutation(len(found))])

    monkeypatch.setattr(Path, "iterdir", iterdir)


@pytest.mark.parametrize("kind", ["seco", "rasters", "published"])
def test_order_does_not_depend_on_the_file_system(tmp_path, shuffled_listing, kind):
    if kind == "seco":
        root = write_seco(tmp_path / "in", locations=4)
    elif kind == "published":
        root = write_published_layout(tmp_path / "in", locations=4)
    else:
        for name in "dbca":
            pixels = frames(10, height=24, width=24, seed=ord(name))
            write_rasters(tmp_path / "in" / name, DATES[:10], pixels)
        root = tmp_path / "in"

    def source():
        if kind == "published":
            return SeriesSource(PublishedCorpus(root))
        return {"seco": SecoSource, "rasters": RasterSource}[kind](root, 24, None)

    build_store(source(), tmp_path / "a")
    build_store(source(), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    names = [row["name"] for row in StoreSeries(tmp_path / "a").table.to_pylist()]
    assert names == sorted(names) and len(names) == 4


def test_other_settings_other_folders_and_other_builders(tmp_path):
    series = PublishedCorpus(write_published_layout(tmp_path / "in"))
    build_store(SeriesSource(series), tmp_path / "store", dates=8)
    before = tree(tmp_path / "store")
    build_store(SeriesSource(series), tmp_path / "store", dates=8)  # nothing left to do
    assert tree(tmp_path / "store") == before
    with pytest.raises(DataError, match="begun with other settings.*rules was"):
        build_store(SeriesSource(series), tmp_path / "store", dates=7)
    with pytest.raises(DataError, match="holds no build to go on with"):
        build_store(SeriesSource(series), tmp_path / "in", dates=8)
    with builder._lock(tmp_path / "store"):
        with pytest.raises(DataError, match="another process builds here"):
            build_store(SeriesSource(series), tmp_path / "store", dates=8)
    for bad in ({"max_cloud": 2}, {"max_nodata": -1}, {"dates": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            build_store(SeriesSource(series), tmp_path / "store", **bad)
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("shape", [(16, 16_385), (16_385, 16)])
def test_headers_beyond_all_measure_are_rejected_unread(tmp_path, shape):
    root = write_seco(tmp_path / "seco", locations=1, dates=DATES[:3])
    write_tif(seco_folder(root, 0, 1) / "B3.tif", np.ones(shape, "uint8"))
    report = build_store(SecoSource(root, 24, None), tmp_path / "store", dates=2)
    assert report["scenes"] == {"candidates": 3, "accepted": 2, "wrong size": 1}
    (row,) = rejections(tmp_path / "store")
    its = f"B3.tif: {shape[0]} x {shape[1]} pixels, at most 16384 a side are read"
    assert row["detail"].endswith(its)


def test_workers_that_end_early(tmp_path, monkeypatch):
    series = PublishedCorpus(write_published_layout(tmp_path / "in"))

    def broken(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(builder.ProcessPoolExecutor, "submit", broken)
    with pytest.raises(DataError, match='store: a worker ended.*fewer workers.*== "__main__"'):
        build_store(SeriesSource(series), tmp_path / "store", workers=1)


def test_a_failing_disk_is_no_rejection(tmp_path, monkeypatch):
    series = PublishedCorpus(write_published_layout(tmp_path / "in"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "settle", full)
        with pytest.raises(OSError, match="No space left"):
            build_store(SeriesSource(series), tmp_path / "store")
    build_store(SeriesSource(series), tmp_path / "store")
    assert StoreSeries(tmp_path / "store").verify() == []


def test_check_covers_stores_and_the_published_layout(tmp_path):
    published = write_published_layout(tmp_path / "in", size=40)
    build_store(SeriesSource(open_series(published)), tmp_path / "store")
    for path in (tmp_path / "store", published):
        report = check_dataset(open_series(path), tmp_path / "check.html")
        assert report.ok and len(report.samples) == 3
        assert (tmp_path / "check.html").read_text().count("data:image/png;base64,") == 4
    shard = tmp_path / "store/shards/00000.npy"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    report = check_dataset(open_series(tmp_path / "store"))
    assert not report.ok
    assert "shards/00000.npy: its content has changed" in str(report)


def test_sources_travel_small(tmp_path):
    root = write_seco(tmp_path / "in", locations=2)
    assert len(pickle.dumps(SecoSource(root, 24, None))) < 2000


@pytest.mark.parametrize("file", ["B2.tif", "B5.tif"])
def test_bands_that_do_not_lie_on_each_other(tmp_path, file):
    root = write_seco(tmp_path / "seco", locations=1, dates=DATES[:4])
    size, scale = (24, 1) if file == "B2.tif" else (12, 2)
    for k, pixels in enumerate((0, 0.4 * scale, 0.6 * scale, 9000)):
        where = TRANSFORM @ Affine.translation(pixels, 0) @ Affine.scale(scale)
        write_tif(seco_folder(root, 0, k) / file, scene(k + 50, size, 1), transform=where)
    bands = ["B04", "B02" if file == "B2.tif" else "B05"]
    report = build_store(SecoSource(root, 24, bands), tmp_path / "store", dates=2)
    assert report["scenes"] == {"candidates": 4, "accepted": 2, "mismatched grids": 2}


def test_a_finished_store_is_of_its_inputs_alone(tmp_path):
    def simulated(**options):
        series = SimulatedSeries(2, size=16, dates=4, output="DN", target=None, **options)
        build_store(SeriesSource(series), tmp_path / "simulated", 2, 1.0, 1.0)

    simulated(seed=0)
    simulated(seed=0)
    for other in ({"seed": 5}, {"seed": 0, "flood": 0.25}):
        with pytest.raises(DataError, match="begun with other settings.*simulation was"):
            simulated(**other)
    root = write_published_layout(tmp_path / "in")
    build_store(SeriesSource(PublishedCorpus(root)), tmp_path / "store")
    table = root / "dates.csv"
    table.write_text(table.read_text().replace(DATES[0], "20160106"))
    with pytest.raises(DataError, match="begun with other settings.*csv was"):
        build_store(SeriesSource(PublishedCorpus(root)), tmp_path / "store")


def test_a_finished_store_that_lost_a_shard(tmp_path):
    source = SeriesSource(PublishedCorpus(write_published_layout(tmp_path / "in")))
    build_store(source, tmp_path / "store")
    (tmp_path / "store/shards/00000.npy").unlink()
    with pytest.raises(DataError, match="shards/00000.npy.*remove its folder and build it again"):
        build_store(source, tmp_path / "store")
