"""The Kuro Siwo reader against a copy written independently of it."""

import json
import shutil

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.fixtures import kuro_siwo
from tests.data.readers.checks import (
    damages,
    fuzz,
    read_damaged,
    same_lengths,
    same_samples,
    same_with_workers,
    shuffle_listings,
)
from timo.data import IGNORE_INDEX, DataError, check_dataset, validate_sample
from timo.data.readers import KuroSiwo, open_dataset
from timo.data.readers.kuro_siwo import ACTIVATIONS

HELD = {"train": (130, 470), "val": (514,), "test": (321,)}  # activations of the small copy


@pytest.fixture
def copy(tmp_path):
    return tmp_path, kuro_siwo.write(tmp_path, size=24)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("kuro_siwo")
    kuro_siwo.write(root, size=16, grids=1, activations=(130,))
    return root


def one_grid(truth, labelled=True, actid=130):
    return next(g for g in truth.values() if g["labelled"] == labelled and g["actid"] == actid)


def rewrite(path, pixels=None, **changes):
    """The raster `path` with other pixels or another profile."""
    with rasterio.open(path) as file:
        held, profile = file.read(), file.profile
    pixels = held if pixels is None else pixels
    profile |= {"count": len(pixels), "dtype": pixels.dtype} | changes
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)


@pytest.mark.parametrize("split", HELD)
@pytest.mark.parametrize("labelled", [True, False])
def test_samples_are_what_was_written(copy, split, labelled):
    root, truth = copy
    dataset = KuroSiwo(root, split, labelled=labelled, activations=HELD[split], clamp=None)
    expected = {
        one["folder"]: one
        for one in truth.values()
        if one["split"] == split and one["labelled"] == labelled
    }
    assert list(dataset.names) == sorted(expected)
    for sample in (dataset[i] for i in range(len(dataset))):
        validate_sample(sample, ("VV", "VH"))
        one = expected[sample["name"]]
        assert sample["dates"].tolist() == one["dates"].tolist()
        valid = ~one["nodata"].any(1) & (one["mna"] == 1)
        np.testing.assert_array_equal(sample["valid"], valid)
        image = np.where(valid[:, None], one["image"], 0)
        np.testing.assert_array_equal(sample["image"], image)
        assert ("mask" in sample) == labelled
        if labelled:
            mask = np.where(one["mlu"] == 3, IGNORE_INDEX, one["mlu"])
            np.testing.assert_array_equal(sample["mask"], mask)


def test_the_split_is_that_of_the_authors_by_activation():
    assert {part: len(ids) for part, ids in ACTIVATIONS.items()} == {
        "train": 27,
        "val": 7,
        "test": 10,
    }
    assert len({act for ids in ACTIVATIONS.values() for act in ids}) == 44


def test_split_hash_depends_on_the_grids_alone(copy, tmp_path_factory):
    root, _ = copy
    first = KuroSiwo(root, activations=HELD["train"]).split_hash
    moved = tmp_path_factory.mktemp("moved") / "copy"
    shutil.copytree(root, moved)
    assert KuroSiwo(moved, activations=(470, 130)).split_hash == first
    assert KuroSiwo(root, activations=(130,)).split_hash != first


def test_order_does_not_depend_on_listings(copy, monkeypatch):
    root, _ = copy
    plain = KuroSiwo(root, activations=HELD["train"])
    samples = [plain[i] for i in range(len(plain))]
    shuffle_listings(monkeypatch)
    other = KuroSiwo(root, activations=HELD["train"])
    assert other.names == plain.names
    same_samples(samples, [other[i] for i in range(len(other))])


def test_dates_belong_to_their_frames_and_the_flood_is_last(copy):
    root, truth = copy
    one = one_grid(truth)
    dataset = KuroSiwo(root, activations=(130,), clamp=None)
    sample = dataset[dataset.names.index(one["folder"])]
    assert (sample["dates"].diff() > 0).all()
    np.testing.assert_array_equal(sample["image"][2, 0, 5], one["image"][2, 0, 5])


def test_passes_out_of_order_are_refused(copy):
    root, truth = copy
    folder = root / one_grid(truth)["folder"]
    for path in list(folder.glob("SL2_*")):
        path.rename(path.with_name(path.name[: -len("20190416.tif")] + "20190601.tif"))
    with pytest.raises(DataError, match="must follow one another"):
        read_all(KuroSiwo(root, activations=(130,)))


def test_bands_of_a_pass_with_different_dates_are_refused(copy):
    root, truth = copy
    path = next((root / one_grid(truth)["folder"]).glob("MS1_IVV_*"))
    path.rename(path.with_name(path.name[:-8] + "0707.tif"))
    with pytest.raises(DataError, match="state the dates 20190511, 20190707"):
        read_all(KuroSiwo(root, activations=(130,)))


def read_all(dataset):
    return [dataset[i] for i in range(len(dataset))]


def test_a_grid_with_one_earlier_pass_has_two_dates(copy):
    root, truth = copy
    folder = root / one_grid(truth, labelled=False)["folder"]
    for path in folder.glob("SL2_*"):
        path.unlink()
    with pytest.raises(DataError, match="2 of .* files of the grids are missing, as .*SL2_IVV"):
        KuroSiwo(root, labelled=False, activations=(130,))
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps(info | {"slavecov": 1}))
    dataset = KuroSiwo(root, labelled=False, activations=(130,))
    assert dataset[0]["image"].shape[0] == 2
    same_lengths(dataset)


def test_backscatter_is_clamped_not_stretched(copy):
    root, truth = copy
    one = one_grid(truth)
    dataset = KuroSiwo(root, activations=(130,))
    sample = dataset[dataset.names.index(one["folder"])]
    valid = sample["valid"][:, None].expand_as(sample["image"])
    expected = torch.from_numpy(one["image"]).clamp(max=0.15)
    assert torch.equal(sample["image"][valid], expected[valid])
    mean, deviation = dataset.statistics()
    torch.testing.assert_close(mean, torch.tensor([0.0953, 0.0264]))
    torch.testing.assert_close(deviation, torch.tensor([0.0427, 0.0215]))
    measured, _ = KuroSiwo(root, activations=(130,), clamp=None).statistics()
    assert abs(measured[0] - 0.0953) > 1e-3


def test_published_protocol_stretches_each_image_with_its_empty_pixels(copy):
    root, truth = copy
    one = one_grid(truth)
    dataset = KuroSiwo(root, activations=(130,), protocol="published")
    sample = dataset[dataset.names.index(one["folder"])]
    validate_sample(sample, dataset.bands)
    assert sample["valid"].all()
    frame = np.where(one["mna"] == 1, one["image"][2, 0], 0)
    np.testing.assert_allclose(sample["image"][2, 0], frame / frame.max(), rtol=1e-6)
    assert sample["dates"].diff().gt(0).all()


def test_one_nan_costs_one_pixel(copy):
    root, truth = copy
    one = one_grid(truth)
    dataset = KuroSiwo(root, activations=(130,), clamp=None)
    index = dataset.names.index(one["folder"])
    before = dataset[index]
    pixels = one["image"][1, :1].copy()
    pixels[0, 7, 7] = np.nan
    rewrite(next((root / one["folder"]).glob("SL1_IVV_*")), pixels)
    after = dataset[index]
    assert not after["valid"][1, 7, 7] and (after["image"][1, :, 7, 7] == 0).all()
    changed = after["valid"] != before["valid"]
    assert changed.sum() == 1
    assert torch.equal(after["image"][0], before["image"][0])


def test_zero_is_no_data_whatever_the_tag_of_the_file(copy):
    root, truth = copy
    one = one_grid(truth)
    dataset = KuroSiwo(root, activations=(130,))
    index = dataset.names.index(one["folder"])
    before = dataset[index]["valid"]
    assert not before[1, 3, 5] and before[1, 3, 6]
    for path in (root / one["folder"]).glob("SL1_*"):
        rewrite(path, nodata=None)
    assert torch.equal(dataset[index]["valid"], before)


def test_partial_downloads_say_what_is_missing(copy):
    root, truth = copy
    with pytest.raises(DataError, match="25 of 27 activations of split .train. are missing"):
        KuroSiwo(root)
    with pytest.raises(DataError, match="is not a folder; .* Get it from https"):
        KuroSiwo(root / "nowhere")
    for path in (root / one_grid(truth)["folder"]).glob("*_IVH_*"):
        path.unlink()
    with pytest.raises(DataError, match="3 of 32 files of the grids are missing"):
        KuroSiwo(root, activations=HELD["train"])
    shutil.rmtree(root / "514")
    (root / "514").mkdir()
    with pytest.raises(DataError, match="holds no sample"):
        KuroSiwo(root, "val", activations=(514,))


def ones(dtype, count=1, rows=24, value=1):
    return np.full((count, rows, 24), value, dtype)


def copy_as(path, name):
    shutil.copy(path, path.with_name(name))


def test_a_partial_copy_can_be_used_as_it_is(copy, caplog):
    root, truth = copy
    next((root / one_grid(truth)["folder"]).glob("MK0_MLU_*")).unlink()
    dataset = KuroSiwo(root, incomplete="skip")
    assert len(dataset) == 3 and one_grid(truth)["folder"] not in dataset.names
    assert "25 of 27 activations" in caplog.text and "1 of 32 files" in caplog.text
    assert len(KuroSiwo(root, "all", incomplete="skip")) == 7


BAD = {
    "truncated": ("MS1_IVV", lambda p: p.write_bytes(p.read_bytes()[:600]), "cannot be read"),
    "text": ("MS1_IVV", lambda p: p.write_text("<html>404</html>"), "cannot be read"),
    "wrong dtype": ("SL1_IVH", lambda p: rewrite(p, ones("uint8")), "dtype"),
    "two bands": ("SL1_IVH", lambda p: rewrite(p, ones("float32", 2)), "band count"),
    "other size": ("SL2_IVH", lambda p: rewrite(p, ones("float32", rows=20), height=20), "size"),
    "other projection": ("SL2_IVV", lambda p: rewrite(p, crs="EPSG:32736"), "grid"),
    "labels outside": ("MK0_MLU", lambda p: rewrite(p, ones("uint8", value=7)), r"\[7\]"),
    "float labels": ("MK0_MLU", lambda p: rewrite(p, ones("float32")), "dtype"),
    "two of a role": ("MK0_MLU", lambda p: copy_as(p, "MK0_MLU_130_01_20200101.tif"), "same grid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(copy, case):
    root, truth = copy
    role, spoil, says = BAD[case]
    path = next((root / one_grid(truth)["folder"]).glob(f"{role}_*"))
    spoil(path)
    with pytest.raises(DataError, match=says) as caught:
        read_all(KuroSiwo(root, activations=(130,)))
    assert role in str(caught.value)


def test_bad_arguments(copy):
    root, _ = copy
    for options, says in (
        ({"split": "odd"}, "split: must be one of train, val, test, all"),
        ({"protocol": "odd"}, "protocol: must be one of sound, published"),
        ({"clamp": 0.0}, "clamp: must be above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            KuroSiwo(root, activations=(130,), **options)


def test_workers_give_the_same_samples(shared):
    same_with_workers(KuroSiwo(shared, activations=(130,)))


def test_data_check_finds_it_fit(copy):
    root, _ = copy
    report = check_dataset(open_dataset("kuro_siwo", root, "test", activations=(321,)))
    assert report.ok, str(report)
    assert set(report.labels) == {0, 1, 2, 255}


@fuzz
@given(damage=damages, number=st.integers(0, 12))
def test_damaged_files_are_refused_or_harmless(shared, damage, number):
    files = sorted(next((shared / "130" / "01").iterdir()).iterdir())
    read_damaged(files[number % len(files)], damage, lambda: KuroSiwo(shared, activations=(130,)))
