import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from tests.data.fixtures import mtlcc
from tests.data.writers import write_tif
from timo.data import DataError, open_dataset
from timo.data.readers import MTLCC

SPLIT_OF = {"train": "train_fold0", "val": "test_fold0", "test": "eval"}


def test_truth(tmp_path):
    truth = mtlcc.write(tmp_path)
    assert (MTLCC(tmp_path).scale == torch.tensor(1e-4)).all() and (
        MTLCC(tmp_path).offset == 0
    ).all()
    for split, file in SPLIT_OF.items():
        dataset = MTLCC(tmp_path, split)
        assert set(dataset.names) == {n for n, one in truth.items() if one["split"] == file}
        for index, name in enumerate(dataset.names):
            sample, one = dataset[index], truth[name]
            np.testing.assert_array_equal(sample["dates"], one["dates"])
            fine = [one["10m"]]
            for key, factor in (("20m", 2), ("60m", 6)):
                fine.append(np.kron(one[key], np.ones((factor, factor), np.uint16)))
            np.testing.assert_array_equal(sample["image"], np.concatenate(fine, axis=1))
            assert sample["image"].dtype == torch.uint16 and sample["valid"].all()
    assert dataset.bands == tuple(b for bands in mtlcc.BANDS.values() for b in bands)
    assert dataset.units == "reflectance"


def test_sparse_ids_become_classes_and_unknown_is_ignored(tmp_path):
    truth = mtlcc.write(tmp_path)
    dataset = MTLCC(tmp_path)
    ids = [number for number in mtlcc.CLASSES if number]
    assert dataset.classes == tuple(mtlcc.CLASSES[number] for number in ids)
    sample = dataset[0]
    expected = truth[sample["name"]]["y"]
    for number in ids:
        where = sample["mask"].numpy() == ids.index(number)
        np.testing.assert_array_equal(where, expected == number)
    assert (sample["mask"][0] == 255).all() and (sample["mask"][1:] < 17).all()


def test_bands_of_one_resolution_need_no_other_files(tmp_path):
    truth = mtlcc.write(tmp_path, size=48)
    for path in tmp_path.rglob("*_60m.tif"):
        path.unlink()
    dataset = MTLCC(tmp_path, select=["B12", "B02"])
    sample = dataset[0]
    coarse = truth[sample["name"]]["20m"][:, 5]
    np.testing.assert_array_equal(sample["image"][:, 0, ::2, 1::2], coarse)
    with pytest.raises(DataError, match="60m.tif; the copy is incomplete"):
        MTLCC(tmp_path)
    swapped = MTLCC(tmp_path, select=["B02"], bands_10m=("B04", "B03", "B02", "B08"))[0]
    np.testing.assert_array_equal(swapped["image"][:, 0], truth[sample["name"]]["10m"][:, 2])


def test_both_years(tmp_path):
    truth = mtlcc.write(tmp_path, size=12, folders=("data16", "data17"))
    with pytest.raises(DataError, match=r"has \['data16', 'data17'\]: state folders="):
        MTLCC(tmp_path)
    dataset = open_dataset("mtlcc", tmp_path, folders=["data17", "data16"])
    assert dataset.names == tuple(sorted(n for n in truth if truth[n]["split"] == "train_fold0"))


def test_splits_that_share_a_tile(tmp_path):
    mtlcc.write(tmp_path, size=12)
    with (tmp_path / "tileids" / "test_fold0.tileids").open("a") as file:
        file.write("12\n")
    with pytest.raises(DataError, match=r"shares 1 tiles with .*train_fold0.tileids, as \['12'\]"):
        MTLCC(tmp_path)


@pytest.mark.parametrize("tile", ["../../../etc", "/etc"])
def test_a_list_that_leaves_the_root(tmp_path, tile):
    mtlcc.write(tmp_path, size=12)
    (tmp_path / "tileids" / "train_fold0.tileids").write_text(f"7\n{tile}\n")
    with pytest.raises(DataError, match="lies outside"):
        MTLCC(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0|unknown\n1\n", r"line 2 is '1'; it must be <id>\|<name>"),
        ("0|unknown\n1|a\n1|b\n", "each id once"),
        ("0|unknown\n-1|a\n", "line 2"),
        ("0|unknown\n", "names 0 classes beside 0"),
    ],
)
def test_bad_classes(tmp_path, text, message):
    mtlcc.write(tmp_path, size=12)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        MTLCC(tmp_path)


def rewrite(path, change):
    with rasterio.open(path) as file:
        pixels, where = file.read(), {"crs": file.crs, "transform": file.transform}
    path.unlink()
    pixels, where = change(pixels, where)
    write_tif(path, pixels, **where)


def shifted(pixels, where):
    return pixels, where | {"transform": where["transform"] @ Affine.translation(1, 0)}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("20160104_20m.tif", lambda p, w: (p[:5], w), "its band count is 5, it must be 6"),
        ("20160104_10m.tif", lambda p, w: (p.astype("float32"), w), "dtype is float32, .* uint16"),
        ("20160104_10m.tif", lambda p, w: (p[:, :6], w), r"size is \(6, 12\)"),
        ("20160104_60m.tif", shifted, "its grid is"),
        ("20160104_20m.tif", lambda p, w: (p, w | {"crs": "EPSG:32633"}), "its grid is"),
        ("y.tif", lambda p, w: (p + 100, w), r"holds the labels \[100"),
        ("y.tif", lambda p, w: (p[:, :10], w), r"size is \(12, 12\), it must be \(10, 12\)"),
    ],
)
def test_files_that_are_not_as_published(tmp_path, name, change, message):
    mtlcc.write(tmp_path, size=12)
    rewrite(tmp_path / "data" / "101" / name, change)
    with pytest.raises(DataError, match=message) as error:
        MTLCC(tmp_path)[0]
    assert str(tmp_path / "data" / "101") in str(error.value)


def test_nodata_pixels_are_not_valid(tmp_path):
    mtlcc.write(tmp_path, size=12)
    for resolution in (10, 20, 60):
        rewrite(
            tmp_path / "data" / "101" / f"20160104_{resolution}m.tif",
            lambda pixels, where: (
                pixels * (np.arange(pixels.shape[2]) > 0).astype("uint16"),
                where,
            ),
        )
    valid = MTLCC(tmp_path)[0]["valid"]
    assert not valid[0, :, :1].any() and valid[0, :, 6:].all() and valid[1:].all()


def test_hash_is_known(tmp_path):
    mtlcc.write(tmp_path, size=12)
    hashes = {split: MTLCC(tmp_path, split).split_hash[:8] for split in SPLIT_OF}
    assert hashes == {"train": "aeef7016", "val": "e14884e5", "test": "4c551e6f"}
