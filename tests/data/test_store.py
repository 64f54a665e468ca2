import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.corpora import scene, write_published_layout
from timo.data import (
    DataError,
    LocationLoader,
    StoreSeries,
    TransformedSeries,
    collate_series,
    locations,
    open_series,
    validate_sample,
)
from timo.data import store as store_module
from timo.data.building import SeriesSource, build_store, builder
from timo.data.store import (
    FORMAT,
    INDEX,
    REJECTED,
    REPORT,
    sha256,
    shard_bytes,
    shard_header,
    shard_name,
    write_index,
    write_manifest,
)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    """Seven locations (10, 3, 24, 24) in shards of two; location 3 has pixels without data."""
    root = tmp_path_factory.mktemp("store")
    published = write_published_layout(root / "published", locations=7)
    holes = np.load(published / "000003.npy")
    holes[2, :, :2, :3] = 0
    np.save(published / "000003.npy", holes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "_SHARD_BYTES", 2 * 10 * 3 * 24 * 24)
        build_store(SeriesSource(open_series(published)), root / "store")
    return root / "store"


def source_pixels(index):
    pixels = np.stack([scene(100 * index + k, 24) for k in range(10)])
    if index == 3:
        pixels[2, :, :2, :3] = 0
    return pixels


def test_whole_locations(store_path):
    store = StoreSeries(store_path)
    assert len(store) == 7 and store.bands == ("B04", "B03", "B02")
    assert len(list((store_path / "shards").iterdir())) == 4
    for index in range(7):
        sample = store[index]
        validate_sample(sample, store.bands)
        expected = source_pixels(index)
        assert sample["image"].dtype == torch.uint8 and "window" not in sample
        assert np.array_equal(sample["image"].numpy(), expected)
        assert np.array_equal(sample["valid"].numpy(), (expected != 0).any(1))
        assert sample["dates"].dtype == torch.int64 and (sample["dates"].diff() > 0).all()
    with pytest.raises(IndexError):
        store[7]


def test_windows_and_dates_are_cut_from_the_location(store_path):
    store = StoreSeries(store_path, tile=(16, 20), dates=3, seed=5)
    assert store.sample_shape == (3, 3, 16, 20)
    whole = StoreSeries(store_path)
    corners, subsets = set(), set()
    for epoch in range(30):
        store.set_epoch(epoch)
        sample = store[3]
        validate_sample(sample, store.bands)
        days = whole[3]["dates"].tolist()
        frames = [days.index(day) for day in sample["dates"].tolist()]
        assert frames == sorted(set(frames)) and len(frames) == 3
        row, col = sample["window"]
        window = source_pixels(3)[frames][:, :, row : row + 16, col : col + 20]
        assert np.array_equal(sample["image"].numpy(), window)
        assert np.array_equal(sample["valid"].numpy(), (window != 0).any(1))
        corners.add((row, col))
        subsets.add(tuple(frames))
    assert len(corners) > 15 and len(subsets) > 20
    assert min(row for row, _ in corners) == 0 and max(row for row, _ in corners) == 8


def test_draws_are_uniform_over_windows_and_dates(store_path):
    store = StoreSeries(store_path, tile=23, dates=2)
    counts = np.zeros((2, 2))
    dates = np.zeros(10)
    for epoch in range(400):
        store.set_epoch(epoch)
        rows, cols, frames = store._draw([0, 1, 2])
        np.add.at(counts, (rows, cols), 1)
        np.add.at(dates, np.ravel(frames), 1)
    assert (np.abs(counts / 1200 - 1 / 4) < 0.05).all()
    assert (np.abs(dates / 2400 - 1 / 10) < 0.03).all()


def test_selected_bands(store_path):
    store = StoreSeries(store_path, select=("B02", "B04"))
    assert np.array_equal(store[1]["image"].numpy(), source_pixels(1)[:, [2, 0]])
    assert np.array_equal(store[3]["valid"].numpy(), (source_pixels(3) != 0).any(1))
    with pytest.raises(DataError, match="no band named B08"):
        StoreSeries(store_path, select=("B08",))


def test_batches_equal_collated_samples(store_path):
    store = StoreSeries(store_path, tile=16, dates=4)
    batch = store.batch([5, 3, 0])
    samples = collate_series([store[5], store[3], store[0]])
    assert batch.keys() == samples.keys()
    for key in ("image", "dates", "valid"):
        assert torch.equal(batch[key], samples[key])
    assert batch["name"] == samples["name"] and batch["window"] == samples["window"]
    clear = store.batch([0, 1])["valid"]
    assert clear.shape == (2, 4, 16, 16) and clear.all() and clear.untyped_storage().nbytes() == 1


@pytest.mark.parametrize("bad", [{"tile": 25}, {"tile": 0}, {"dates": 11}, {"dates": 0}])
def test_windows_and_dates_that_do_not_exist(store_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        StoreSeries(store_path, **bad)


def batches(path, workers, context=None):
    data = TransformedSeries(StoreSeries(path, tile=16, dates=3, seed=1), [])
    loader = DataLoader(
        data, 3, num_workers=workers, collate_fn=collate_series, persistent_workers=workers > 0,
        multiprocessing_context=context,
    )  # fmt: skip
    out = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        out += list(loader)
    return out


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, context", [(1, "fork"), (4, "fork"), (1, "spawn")])
def test_same_samples_whatever_the_workers(store_path, workers, context):
    alone, shared = batches(store_path, 0), batches(store_path, workers, context)
    assert len(alone) == len(shared) == 6
    for a, b in zip(alone, shared):
        assert a["name"] == b["name"] and a["window"] == b["window"]
        assert all(torch.equal(a[key], b[key]) for key in ("image", "dates", "valid"))
    assert alone[0]["window"] != alone[3]["window"]  # epochs differ


def test_maps_are_bounded_and_shards_are_not_reopened(store_path, monkeypatch):
    monkeypatch.setattr(locations, "MOST_MAPS", 2)
    opened = []
    monkeypatch.setattr(
        store_module.mmap, "mmap",
        lambda *a, _real=store_module.mmap.mmap, **k: opened.append(1) or _real(*a, **k),
    )  # fmt: skip
    store = StoreSeries(store_path)
    for index in (0, 1, 2, 3, 0, 1, 2):
        store[index]
        assert len(store._maps) <= 2
    assert len(opened) == 2
    store[6], store[0]
    assert len(opened) == 4  # 6 took the place of 0


def test_pickled_store_holds_no_pixels(store_path):
    store = StoreSeries(store_path)
    state = store.__getstate__()
    assert "_dates" not in state
    assert store[0]["image"].any() and store._maps
    assert not pickle.loads(pickle.dumps(store))._maps
    assert len(pickle.dumps({k: v for k, v in state.items() if k != "_epoch"})) < 20_000


def sparse_store(root, locations=100_000, per_shard=256):
    """A store whose shards are holes, of (10, 3, 264, 264) uint8 locations."""
    shape = (10, 3, 264, 264)
    (root / "shards").mkdir(parents=True)
    counts = [min(per_shard, locations - i) for i in range(0, locations, per_shard)]
    files = {}
    for number, count in enumerate(counts):
        path = root / shard_name(number)
        path.write_bytes(shard_header((count, *shape), np.dtype("uint8")))
        os.truncate(path, shard_bytes((count, *shape), np.dtype("uint8")))
        files[shard_name(number)] = {"bytes": path.stat().st_size, "sha256": "none"}
    one = {"dates": list(range(17000, 17100, 10)), "longitude": 1.0, "latitude": 2.0,
           "valid": [1.0] * 10, "cloud": [0.0] * 10,
           "source": ["20160105T101031_20160105T101026_T32TQM"] * 10}  # fmt: skip
    write_index(
        root / INDEX,
        [one | {"name": f"{i:06d}", "shard": i // per_shard, "slot": i % per_shard}
         for i in range(locations)],
        10,
    )  # fmt: skip
    for name in (REPORT, REJECTED):
        (root / name).write_text("")
    for name in (INDEX, REPORT, REJECTED):
        size = (root / name).stat().st_size
        files[name] = {"bytes": size, "sha256": sha256(root / name)}
    write_manifest(root, {
        "format": FORMAT, "shape": shape, "dtype": "uint8", "bands": ["B04", "B03", "B02"],
        "units": "DN", "scale": [1.0] * 3, "offset": [0.0] * 3, "shards": counts, "files": files,
        "build": {},
    })  # fmt: skip
    return root


def private_bytes():
    """Memory of this process that is not the system's cache of files."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["RssAnon"].split()[0]) * 1024


def test_a_large_corpus_opens_without_its_shards_in_bounded_memory(tmp_path):
    sparse_store(tmp_path / "s")
    StoreSeries(tmp_path / "s")  # imports and warms
    before = private_bytes()
    store = StoreSeries(tmp_path / "s", tile=224, dates=3)
    assert not store._maps  # no shard is touched yet
    assert len(store) == 100_000
    rng, out = np.random.default_rng(0), torch.empty((16, *store.sample_shape), dtype=torch.uint8)
    for _ in range(40):
        store.batch(rng.integers(len(store), size=16).tolist(), out)
    assert private_bytes() - before < 24 << 20
    assert len(store._maps) > 250 and len(store._maps) <= 512


def test_shards_are_plain_numpy_files(store_path):
    shard = np.load(store_path / "shards/00001.npy", mmap_mode="r", allow_pickle=False)
    assert shard.shape == (2, 10, 3, 24, 24) and np.array_equal(shard[1], source_pixels(3))
    row = StoreSeries(store_path).table.to_pylist()[3]
    assert (row["shard"], row["slot"]) == (1, 1)
    assert row["valid"][2] == pytest.approx(1 - 6 / 576) and row["cloud"] == [0] * 10
    assert row["source"][2].startswith("000003/")


def test_unfinished_and_incomplete_stores(store_path, tmp_path):
    with pytest.raises(DataError, match="is no finished store.*build it with"):
        StoreSeries(tmp_path)
    copy = shutil.copytree(store_path, tmp_path / "copy")
    (copy / "shards/00002.npy").unlink()
    with pytest.raises(DataError, match="1 of 7 files are missing.*shards/00002.npy"):
        StoreSeries(copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_while_the_store_is_open(store_path, tmp_path, workers):
    copy = shutil.copytree(store_path, tmp_path / "copy")
    store = StoreSeries(copy)
    store[0]
    (copy / "shards/00001.npy").unlink()
    (copy / "shards/00002.npy").write_bytes(b"")
    lost = int((store.table["shard"].to_numpy() == 1).argmax())
    with pytest.raises(DataError, match="shards/00001.npy: cannot be read.*fetch the store again"):
        list(LocationLoader(store, 1, [0, lost], workers))
    with pytest.raises(DataError, match="shards/00002.npy: cannot be read"):
        store[int((store.table["shard"].to_numpy() == 2).argmax())]
    assert torch.equal(store[0]["image"], StoreSeries(store_path)[0]["image"])


def test_manifest_may_not_name_files_outside(store_path, tmp_path):
    copy = shutil.copytree(store_path, tmp_path / "copy")
    manifest = json.loads((copy / "store.json").read_text())
    del manifest["checksum"]
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    write_manifest(copy, manifest)
    with pytest.raises(DataError, match="lists files that are not those of a store"):
        StoreSeries(copy)


@pytest.mark.parametrize("column, value", [("shard", 9), ("slot", 2), ("dates", [5] * 10)])
def test_index_that_does_not_fit_the_shards(store_path, tmp_path, column, value):
    copy = shutil.copytree(store_path, tmp_path / "copy")
    rows = StoreSeries(store_path).table.to_pylist()
    rows[4][column] = value
    write_index(copy / INDEX, rows, 10)
    manifest = json.loads((copy / "store.json").read_text())
    del manifest["checksum"]
    size = (copy / INDEX).stat().st_size
    manifest["files"][INDEX] = {"bytes": size, "sha256": sha256(copy / INDEX)}
    write_manifest(copy, manifest)
    with pytest.raises(DataError, match="does not belong to the shards"):
        StoreSeries(copy)
