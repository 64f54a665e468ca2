import json

import numpy as np
import pytest
import rasterio
import torch

from tests.data.fixtures import multisenge
from tests.data.readers.checks import same_lengths
from tests.data.writers import write_tif
from timo.data import DataError
from timo.data.readers import MultiSenGE


@pytest.mark.parametrize("dtype, nodata", [(np.uint16, 0), (np.int16, -10000)])
def test_truth(tmp_path, dtype, nodata):
    truth = multisenge.write(tmp_path, size=8, dtype=dtype, nodata=nodata, unlabelled=True)
    members = multisenge.split(truth)
    for split in ("train", "val", "test"):
        dataset = MultiSenGE(tmp_path, split)
        assert list(dataset.names) == members[split]
        for index, name in enumerate(dataset.names):
            sample, one = dataset[index], truth[name]
            valid = np.ones((7, 8, 8), bool)
            valid[0, 0, 0] = False  # the earliest date, not the first listed
            np.testing.assert_array_equal(sample["valid"], valid)
            np.testing.assert_array_equal(
                sample["image"], np.where(valid[:, None], one["image"], 0)
            )
            np.testing.assert_array_equal(sample["dates"], one["dates"])
            np.testing.assert_array_equal(sample["mask"], (one["mask"].astype(int) - 1) % 256)
    assert (sample["mask"][0] == 255).all() and sample["mask"].dtype == torch.int64
    assert dataset.bands == multisenge.BANDS and len(dataset.classes) == 14
    assert dataset.units == "reflectance" and (dataset.scale == torch.tensor(1e-4)).all()


def test_the_rule_holds_for_all_tiles_only(tmp_path):
    multisenge.write(tmp_path, size=8, tiles=multisenge.TILES[:9])
    with pytest.raises(DataError, match="patches of 9 tiles, 31TFN, .* rule over all 14"):
        MultiSenGE(tmp_path)
    assert len(MultiSenGE(tmp_path, "all")) == 9
    assert MultiSenGE(tmp_path, tiles=["31UEQ"]).names == ("31UEQ_1028_0",)
    with pytest.raises(DataError, match="holds no 32ULU"):
        MultiSenGE(tmp_path, tiles=["32ULU"])


def test_published_draws_with_replacement_but_in_order(tmp_path):
    multisenge.write(tmp_path, size=8)
    sound, drawn = MultiSenGE(tmp_path, "all"), MultiSenGE(tmp_path, "all", protocol="published")
    repeated = 0
    for index in range(len(drawn)):
        sample, again, whole = drawn[index], drawn[index], sound[index]
        assert torch.equal(sample["dates"], again["dates"]) and len(sample["dates"]) == 3
        assert (sample["dates"].diff() >= 0).all()
        for day, frame in zip(sample["dates"], sample["image"]):
            at = whole["dates"].tolist().index(int(day))
            assert torch.equal(frame, whole["image"][at])
        repeated += len(set(sample["dates"].tolist())) < 3
    assert repeated > 0
    same_lengths(drawn)
    with pytest.raises(ValueError, match="protocol: must be one of sound, published"):
        MultiSenGE(tmp_path, protocol="paper")


def described(root, **changes):
    path = root / "labels" / "31TFN_1028_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "listed, message",
    [
        (None, "must name the acquisitions in 'corresponding_s2'"),
        (" ; ", "must name the acquisitions"),
        ("../../x.tif", "lies outside"),
        ("31TFN_20200731_S2_1028_1.tif", "which is no acquisition of this patch"),
        ("31TFN_20201399_S2_1028_0.tif", "which is no acquisition of this patch"),
        ("31TFN_20200731_S2_1028_0.tif;31TFN_20200731_S2_1028_0.tif", "have the same date"),
        ("31TFN_20190731_S2_1028_0.tif", r"1 of \d+ files named by labels"),
    ],
)
def test_bad_lists(tmp_path, listed, message):
    multisenge.write(tmp_path, size=8)
    described(tmp_path, corresponding_s2=listed)
    with pytest.raises(DataError, match=message):
        MultiSenGE(tmp_path)


@pytest.mark.parametrize(
    "pixels, on_grid, message",
    [
        (np.ones((9, 8, 8), np.uint16), True, "its band count is 9, it must be 10"),
        (np.ones((10, 8, 8), np.float32), True, "dtype is float32, it must be uint16 or int16"),
        (np.ones((10, 8, 7), np.uint16), True, r"size is \(8, 7\), it must be \(8, 8\)"),
        (np.ones((10, 8, 8), np.uint16), False, "its grid is"),
        (np.ones((10, 8, 8), np.int16), True, "all dates of a patch must agree"),
    ],
)
def test_files_that_are_not_as_published(tmp_path, pixels, on_grid, message):
    multisenge.write(tmp_path, size=8)
    path = tmp_path / "s2" / "31TFN_20200820_S2_1028_0.tif"
    with rasterio.open(path) as file:
        where = {"crs": file.crs if on_grid else "EPSG:32630", "transform": file.transform}
    path.unlink()
    write_tif(path, pixels, **where)
    with pytest.raises(DataError, match=message) as error:
        MultiSenGE(tmp_path)[0]
    assert str(path) in str(error.value)


def test_a_name_that_is_none(tmp_path):
    multisenge.write(tmp_path, size=8)
    (tmp_path / "labels" / "notes.json").write_text("{}")
    with pytest.raises(DataError, match="must be named <tile>_<x>_<y>.json"):
        MultiSenGE(tmp_path)
