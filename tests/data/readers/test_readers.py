"""What all readers have in common, on small copies in the published layouts."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.fixtures import mtlcc, multiearth, multisenge
from tests.data.readers.checks import same_lengths
from tests.data.readers.damage import assert_survives
from timo.data import READERS, DataError, check_dataset, open_dataset, validate_sample
from timo.data.readers.common import inside, map_labels, read_json, read_raster, split_hash

# name: (writer, its options, options of the reader)
COPIES = {
    "mtlcc": (mtlcc.write, {"size": 24}, {}),
    "multiearth": (multiearth.write, {"size": 16}, {}),
    "multisenge": (multisenge.write, {"size": 8}, {}),
}


@pytest.fixture(params=COPIES)
def copy(request, tmp_path):
    """(name, root, open) of a copy; `open(**options)` gives the dataset."""
    write, options, reader = COPIES[request.param]
    write(tmp_path, **options)

    def opened(split="all", **more):
        return open_dataset(request.param, tmp_path, split, **reader, **more)

    return request.param, tmp_path, opened


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def test_samples_keep_the_contract(copy):
    dataset = copy[2]()
    assert len(dataset) >= 4 and dataset.names == tuple(sorted(dataset.names))
    for index in range(len(dataset)):
        sample = dataset[index]
        validate_sample(sample, dataset.bands)
        assert sample["name"] == dataset.names[index]
        assert set(sample["mask"].unique().tolist()) <= {*range(len(dataset.classes)), 255}
    same_lengths(dataset)


def test_splits_are_disjoint_and_hashed(copy):
    _, _, opened = copy
    whole, seen = opened(), set()
    for split in ("train", "val", "test"):
        try:
            part = opened(split)
        except DataError as error:  # four places need not fall into all three parts
            assert "holds no sample" in str(error)
            continue
        assert not seen & set(part.names)
        seen |= set(part.names)
        text = "\n".join(sorted(part.names))
        assert part.split_hash == hashlib.sha256(text.encode()).hexdigest()
    assert seen <= set(whole.names)


def test_order_of_the_directory_changes_nothing(copy, monkeypatch):
    _, _, opened = copy
    first = opened()
    for method in ("iterdir", "glob", "rglob"):
        listed = getattr(Path, method)
        monkeypatch.setattr(
            Path,
            method,
            lambda self, *args, listed=listed: iter(sorted(listed(self, *args), reverse=True)),
        )
    second = opened()
    assert second.names == first.names and second.split_hash == first.split_hash
    assert all(equal(first[i], second[i]) for i in range(len(first)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(copy, workers):
    dataset = copy[2]()
    options = {"batch_size": None, "num_workers": workers, "collate_fn": same}
    loaded = list(DataLoader(dataset, **options))
    assert len(loaded) == len(dataset)
    assert all(equal(dataset[i], sample) for i, sample in enumerate(loaded))


def same(sample):
    return sample


def test_reading_again_gives_the_same(copy):
    dataset = copy[2]()
    state = np.random.get_state()[1].copy()
    assert equal(dataset[0], dataset[0])
    assert (np.random.get_state()[1] == state).all()  # no global generator is touched


def test_bands_by_name(copy):
    _, _, opened = copy
    whole = opened()
    chosen = [whole.bands[2], whole.bands[0]]
    part = opened(select=chosen)
    assert part.bands == tuple(chosen)
    assert torch.equal(part[0]["image"], whole[0]["image"][:, [2, 0]])
    with pytest.raises(DataError, match="no band named B99"):
        opened(select=["B99"])


def test_check_finds_them_fit(copy, tmp_path):
    report = check_dataset(copy[2](), tmp_path / "page.html", max_samples=2)
    assert report.ok and report.labels, str(report)


SMALL = {
    "mtlcc": {
        "size": 12,
        "dates": mtlcc.DATES[:2],
        "splits": {"train_fold0": (7,), "test_fold0": (3,), "eval": (5,)},
    },
    "multiearth": {"size": 16, "locations": multiearth.LOCATIONS[:2]},
    "multisenge": {"size": 8, "tiles": multisenge.TILES[:3], "dates": 3},
}


@pytest.mark.parametrize("name", SMALL)
def test_damaged_files(name, tmp_path):
    COPIES[name][0](tmp_path, **SMALL[name])
    options = [{}]
    if name == "multiearth":
        options += [{"sensor": s, "labels": False} for s in ("Sentinel1", "Landsat8")]
    assert_survives(
        tmp_path, lambda: [open_dataset(name, tmp_path, "all", **one) for one in options], 60
    )


def test_partial_downloads_are_counted(copy):
    _, root, opened = copy
    other = ("Deforestation", "Sentinel1", "Landsat")  # not read by default, or labels
    rasters = sorted(p for p in root.rglob("*.tif*") if not p.name.startswith(other))
    for path in rasters[:2]:
        path.unlink()
    with pytest.raises(DataError, match=r"\d+ of \d+ .* are missing, as .*; the copy is incom"):
        opened()
    assert 0 < len(opened(incomplete="skip"))


def test_missing_folders(copy, tmp_path):
    name = copy[0]
    with pytest.raises(DataError, match="is not a folder; it must hold .* Get it from http"):
        open_dataset(name, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=str(tmp_path / "empty")):
        open_dataset(name, tmp_path / "empty")


def test_wrong_arguments(copy):
    with pytest.raises(ValueError, match="split: must be one of train, val, test, all, got 'dev'"):
        copy[2]("dev")
    with pytest.raises(ValueError, match="incomplete: must be one of error, skip"):
        copy[2](incomplete="no")
    with pytest.raises(ValueError, match="name: must be one of .*mtlcc.*, got 'imagenet'"):
        open_dataset("imagenet", ".")
    assert set(COPIES) <= set(READERS)


def test_split_hash_is_of_the_set():
    assert split_hash(["b", "a"]) == split_hash(["a", "b"]) != split_hash(["a"])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_paths_stay_inside(tmp_path, name):
    with pytest.raises(DataError, match="lies outside"):
        inside(tmp_path, name, tmp_path / "list.json")
    assert inside(tmp_path, "a/b.tif", tmp_path / "list.json") == tmp_path / "a" / "b.tif"


def test_a_link_out_of_the_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match="lies outside"):
        inside(tmp_path / "root", "link/secret.tif", tmp_path / "list.json")


def test_labels_do_not_wrap_around():
    table = {0: 255} | {n: n - 1 for n in range(1, 15)}
    mask = map_labels(np.array([[0, 1], [14, 1]], np.uint8), table, Path("gr.tif"))
    assert mask.dtype == torch.int64 and mask.tolist() == [[255, 0], [13, 0]]
    with pytest.raises(DataError, match=r"gr.tif: holds the labels \[15, 255\]"):
        map_labels(np.array([[15, 255]], np.uint8), table, Path("gr.tif"))


def test_a_list_of_files_under_the_name_of_a_raster(tmp_path):
    path = tmp_path / "image.tif"
    path.write_text('<VRTDataset rasterXSize="1" rasterYSize="1"></VRTDataset>')
    with pytest.raises(DataError, match="cannot be read as a raster"):
        read_raster(path, 1, "uint16")


def test_json_that_is_none(tmp_path):
    path = tmp_path / "a.json"
    for text in ("{", "[" * 100_000, json.dumps({"a": 1})[:-2], "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match="a.json: "):
            read_json(path)
