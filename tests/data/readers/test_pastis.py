"""The PASTIS reader against a copy written independently of it."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.fixtures import pastis
from tests.data.readers.checks import (
    damages,
    fuzz,
    read_damaged,
    same_samples,
    same_with_workers,
    shuffle_listings,
)
from timo.data import IGNORE_INDEX, DataError, check_dataset, validate_sample
from timo.data.readers import Pastis, open_dataset


@pytest.fixture
def copy(tmp_path):
    return tmp_path, pastis.write(tmp_path, size=12)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("pastis")
    pastis.write(root, size=8, dates=3, folds=(1,))
    return root


@pytest.mark.parametrize("sensor", ["S2", "S1A", "S1D"])
@pytest.mark.parametrize("as_text", [False, True])
def test_samples_are_what_was_written(tmp_path, sensor, as_text):
    truth = pastis.write(tmp_path, size=12, dates_as_text=as_text)
    dataset = Pastis(tmp_path, "all", sensor=sensor)
    assert list(dataset.names) == sorted(map(str, truth))
    for sample in (dataset[i] for i in range(len(dataset))):
        validate_sample(sample, dataset.bands)
        one = truth[int(sample["name"])]
        order = np.argsort(one[sensor]["dates"], kind="stable")
        assert sample["dates"].tolist() == one[sensor]["dates"][order].tolist()
        np.testing.assert_array_equal(sample["image"], one[sensor]["image"][order])
        assert sample["valid"].all()
        void = one["target"] == 19
        np.testing.assert_array_equal(sample["mask"], np.where(void, IGNORE_INDEX, one["target"]))


def test_units_and_bands(copy):
    root, truth = copy
    dataset = Pastis(root, select=("B04", "B02"))
    assert dataset.bands == ("B04", "B02") and dataset.units == "reflectance"
    torch.testing.assert_close(dataset.scale, torch.tensor([1e-4, 1e-4]))
    one = truth[int(dataset.names[0])]["S2"]
    order = np.argsort(one["dates"])
    np.testing.assert_array_equal(dataset[0]["image"], one["image"][order][:, [2, 0]])
    with pytest.raises(DataError, match="no band named B99"):
        Pastis(root, select=("B99",))


def test_rotations_of_the_folds(copy):
    root, truth = copy
    fold_of = {str(name): one["fold"] for name, one in truth.items()}
    expected = {
        1: ((1, 2, 3), 4, 5),
        2: ((2, 3, 4), 5, 1),
        3: ((3, 4, 5), 1, 2),
        4: ((4, 5, 1), 2, 3),
        5: ((5, 1, 2), 3, 4),
    }
    for fold, (train, val, test) in expected.items():
        for split, folds in (("train", train), ("val", (val,)), ("test", (test,))):
            names = Pastis(root, split, fold=fold).names
            assert {fold_of[name] for name in names} == set(folds)
            assert len(names) == sum(its in folds for its in fold_of.values())


def test_statistics_are_those_of_the_training_folds(copy):
    root, _ = copy
    for split in ("train", "test"):  # a test set does not normalise itself
        mean, deviation = Pastis(root, split, fold=2).statistics()
        torch.testing.assert_close(mean, torch.full((10,), 1003e-4))
        torch.testing.assert_close(deviation, torch.full((10,), 503e-4))
    (root / "NORM_S2_patch.json").unlink()
    assert Pastis(root).statistics()[0].shape == (10,)
    for content in ({"Fold_1": 3}, {f"Fold_{f}": {"mean": [1], "std": [1]} for f in range(1, 6)}):
        (root / "NORM_S2_patch.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="NORM_S2_patch.json: "):
            Pastis(root).statistics()


def test_void_is_neither_trained_nor_scored(copy):
    root, truth = copy
    dataset = Pastis(root, "all")
    assert len(dataset.classes) == 19
    assert all(dataset[i]["mask"].ne(19).all() for i in range(len(dataset)))
    assert any((one["target"] == 19).any() for one in truth.values())


def test_order_does_not_depend_on_listings(copy, monkeypatch):
    root, _ = copy
    samples = [Pastis(root)[i] for i in range(4)]
    shuffle_listings(monkeypatch)
    path = root / "metadata.geojson"
    content = json.loads(path.read_text())
    content["features"].reverse()
    path.write_text(json.dumps(content))
    other = Pastis(root)
    same_samples(samples, [other[i] for i in range(len(other))])


def test_pixels_without_data_are_not_valid(copy):
    root, _ = copy
    path = root / "DATA_S2" / "S2_10000.npy"
    frames = np.load(path)
    frames[1, 3, 2, 5] = -10000
    np.save(path, frames)
    sample = Pastis(root, "test")[0]
    assert (~sample["valid"]).sum() == 1 and (sample["image"][1, :, 2, 5] == 0).all()
    path = root / "DATA_S1A" / "S1A_10000.npy"
    frames = np.load(path)
    frames[0, 1, 4, 4] = np.nan
    np.save(path, frames)
    sample = Pastis(root, "test", sensor="S1A")[0]
    assert (~sample["valid"]).sum() == 1 and sample["image"].isfinite().all()


def test_partial_downloads_say_what_is_missing(copy, caplog):
    root, _ = copy
    (root / "DATA_S2" / "S2_10051.npy").unlink()
    (root / "ANNOTATIONS" / "TARGET_10051.npy").unlink()
    with pytest.raises(DataError, match="2 of 8 files of the patches are missing, as .*S2_10051"):
        Pastis(root)
    assert "10051" not in Pastis(root, incomplete="skip").names
    assert "2 of 8 files" in caplog.text
    (root / "metadata.geojson").unlink()
    with pytest.raises(DataError, match="metadata.geojson: cannot be read"):
        Pastis(root)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def objects(path):
    np.save(path, np.array([Bomb()], object), allow_pickle=True)


def changed(change):
    return lambda path: np.save(path, change(np.load(path)))


BAD = {
    "truncated": ("DATA_S2/S2_10000.npy", lambda p: p.write_bytes(p.read_bytes()[:900]), "plain"),
    "empty": ("DATA_S2/S2_10000.npy", lambda p: p.write_bytes(b""), "plain"),
    "objects": ("DATA_S2/S2_10000.npy", objects, "plain NumPy array"),
    "pickle": ("DATA_S2/S2_10000.npy", lambda p: p.write_bytes(pickle.dumps(Bomb())), "plain"),
    "floats": ("DATA_S2/S2_10000.npy", changed(np.float32), "must be integers"),
    "bands": ("DATA_S2/S2_10000.npy", changed(lambda a: a[:, :9]), r"\(T, 10, H, W\)"),
    "flat": ("DATA_S2/S2_10000.npy", changed(lambda a: a[0]), r"\(T, 10, H, W\)"),
    "dates": ("DATA_S2/S2_10000.npy", changed(lambda a: a[1:]), "lists 7 dates"),
    "label": ("ANNOTATIONS/TARGET_10000.npy", changed(lambda a: a + 9), "no classes"),
    "size": ("ANNOTATIONS/TARGET_10000.npy", changed(lambda a: a[:, 1:]), r"\(3, 12, 12\)"),
    "float label": ("ANNOTATIONS/TARGET_10000.npy", changed(np.float64), "must be integers"),
    "label objects": ("ANNOTATIONS/TARGET_10000.npy", objects, "plain NumPy array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(copy, case):
    root, _ = copy
    name, spoil, says = BAD[case]
    spoil(root / name)
    with pytest.raises(DataError, match=says) as caught:
        Pastis(root, "test")[0]
    assert name in str(caught.value)


def spoiled_list(root, **properties):
    path = root / "metadata.geojson"
    content = json.loads(path.read_text())
    content["features"][0]["properties"] |= properties
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "properties",
    [
        {"Fold": 6},
        {"Fold": None},
        {"ID_PATCH": 10000},
        {"ID_PATCH": "../../etc"},
        {"dates-S2": {"0": 20181301}},
        {"dates-S2": [20180101]},
        {"dates-S2": {"1": 20180101}},
        {"dates-S2": "{"},
    ],
)
def test_bad_metadata_are_named(copy, properties):
    root, _ = copy
    spoiled_list(root, **properties)
    with pytest.raises(DataError, match="metadata.geojson: feature"):
        Pastis(root)


def test_double_dates_are_refused(copy):
    root, truth = copy
    dates = {str(i): 20180924 for i in range(len(truth[10085]["S2"]["dates"]))}
    spoiled_list(root, **{"dates-S2": dates})
    dataset = Pastis(root, "all")
    with pytest.raises(DataError, match="frame 0 and .*frame 1 have the same date"):
        dataset[dataset.names.index("10085")]


@pytest.mark.parametrize("text", ["[]", "{}", '{"features": 3}', '{"features": [1]}', "{", ""])
def test_metadata_of_another_form_are_named(copy, text):
    root, _ = copy
    (root / "metadata.geojson").write_text(text)
    with pytest.raises(DataError, match="metadata.geojson"):
        Pastis(root)


def test_bad_arguments(copy):
    root, _ = copy
    for options, says in (
        ({"split": "odd"}, "split: must be one of"),
        ({"sensor": "s2"}, "sensor: must be one of S2, S1A, S1D"),
        ({"fold": 6}, "fold: must be in 1 ... 5, got 6"),
    ):
        with pytest.raises(ValueError, match=says):
            Pastis(root, **options)


def test_workers_give_the_same_samples(copy):
    same_with_workers(Pastis(copy[0]))


def test_data_check_finds_it_fit(tmp_path):
    pastis.write(tmp_path, size=32)
    report = check_dataset(open_dataset("pastis", tmp_path))
    assert report.ok, str(report)


@fuzz
@given(damage=damages, name=st.sampled_from(["S2", "TARGET", "metadata"]))
def test_damaged_files_are_refused_or_harmless(shared, damage, name):
    root = shared
    path = {
        "S2": root / "DATA_S2" / "S2_10000.npy",
        "TARGET": root / "ANNOTATIONS" / "TARGET_10000.npy",
        "metadata": root / "metadata.geojson",
    }[name]
    read_damaged(path, damage, lambda: Pastis(root))
