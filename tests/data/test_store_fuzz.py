"""Files of a store and of the published layout, with bytes changed and cut off."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.corpora import scene, write_published_layout, write_seco
from timo.data import DataError, PublishedCorpus, StoreSeries, check_dataset, validate_sample
from timo.data.building import SecoSource, SeriesSource, build_store

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published_layout(tmp_path_factory.mktemp("p") / "in", locations=2, size=16)


@pytest.fixture(scope="module")
def store(tmp_path_factory, published):
    root = tmp_path_factory.mktemp("s") / "store"
    build_store(SeriesSource(PublishedCorpus(published)), root)
    return root


@st.composite
def damage(draw):
    """A change of a file: (where, as a share of its length; what)."""
    where = draw(st.floats(0, 1, exclude_max=True))
    return where, draw(st.one_of(st.just("cut"), st.just("longer"), st.integers(1, 255)))


def spoil(content: bytes, where: float, what) -> bytes:
    at = int(where * len(content))
    if what == "cut":
        return content[:at]
    if what == "longer":
        return content + content[at:]
    return content[:at] + bytes([content[at] ^ what]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["store.json", "index.arrow", "shards/00000.npy", "report.json"])
@FUZZ
@given(damage())
def test_no_changed_store_passes_the_check(store, name, change):
    whole = (store / name).read_bytes()
    bad = spoil(whole, *change)
    try:
        (store / name).write_bytes(bad)
        try:
            opened = StoreSeries(store)
        except DataError as error:
            assert str(store) in str(error)
            return
        if name == "store.json":  # only white space may change
            assert opened.manifest | {"checksum": json.loads(whole)["checksum"]} == json.loads(
                whole
            )
            assert opened.verify() == []
            return
        assert name in ("shards/00000.npy", "report.json")  # the index is checked when opened
        assert not check_dataset(opened).ok
        try:
            for index in range(len(opened)):
                validate_sample(opened[index], opened.bands)
        except DataError as error:
            assert name in str(error)
    finally:
        (store / name).write_bytes(whole)


@FUZZ
@given(damage())
def test_changed_arrays_of_the_published_layout(published, change):
    path = published / "000001.npy"
    whole = path.read_bytes()
    try:
        path.write_bytes(spoil(whole, *change))
        try:
            sample = PublishedCorpus(published)[1]
        except DataError as error:
            assert "000001.npy" in str(error)
        else:  # the layout has no checksums: pixels may differ, never their number or type
            validate_sample(sample)
            assert sample["image"].shape == (10, 3, 16, 16)
    finally:
        path.write_bytes(whole)


@FUZZ
@given(damage())
def test_changed_tables_of_the_published_layout(published, change):
    path = published / "dates.csv"
    whole = path.read_bytes()
    try:
        path.write_bytes(spoil(whole, *change))
        try:
            series = PublishedCorpus(published)
            for index in range(len(series)):
                validate_sample(series[index])
        except DataError as error:
            assert "dates.csv" in str(error) or "arrays" in str(error) or ".npy" in str(error)
    finally:
        path.write_bytes(whole)


@settings(FUZZ, max_examples=25)
@given(damage())
def test_changed_rasters_in_a_build(tmp_path_factory, change):
    root = tmp_path_factory.mktemp("fuzz")
    dates = ["20200101", "20200501", "20200901"]
    write_seco(root / "seco", locations=1, dates=dates, size=16)
    bad = sorted((root / "seco/000000").iterdir())[1] / "B3.tif"
    bad.write_bytes(spoil(bad.read_bytes(), *change))
    report = build_store(SecoSource(root / "seco", 16, None), root / "store", dates=2)
    assert report["locations"] == {"candidates": 1, "accepted": 1}
    assert sum(report["scenes"].values()) == 6
    store = StoreSeries(root / "store")
    assert store.verify() == []
    sources = [dates.index(source[:8]) for source in store.table["source"][0].as_py()]
    assert sources == sorted(set(sources)) and len(sources) == 2
    for at, frame in zip(sources, store[0]["image"]):
        assert at == 1 or np.array_equal(frame, scene(at, 16))
    shutil.rmtree(root)
