"""The SEN12-FLOOD reader against a copy written independently of it."""

import json
import shutil

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import Affine

from tests.data.fixtures import sen12_flood
from tests.data.readers.checks import (
    damages,
    fuzz,
    read_damaged,
    same_samples,
    same_with_workers,
    shuffle_listings,
)
from timo.data import DataError, check_dataset, validate_sample
from timo.data.readers import Sen12Flood, open_dataset
from timo.data.readers.sen12_flood import split_places


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    return root, sen12_flood.write(root, size=16)


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, written[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("sen12_flood")
    sen12_flood.write(root, size=8)
    return root


def edit_list(root, place, change, sensor="S2"):
    path = root / f"{sensor}list.json"
    content = json.loads(path.read_text())
    change(content[place])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("sensor", ["s2", "s1"])
def test_samples_are_what_was_written(copy, sensor):
    root, truth = copy
    dataset = Sen12Flood(root, "all", sensor=sensor)
    assert list(dataset.names) == sorted(truth)
    for sample in (dataset[i] for i in range(len(dataset))):
        validate_sample(sample, dataset.bands)
        one = truth[sample["name"]][sensor]
        assert sample["dates"].tolist() == one["dates"].tolist()
        assert sample["label"].tolist() == one["label"].tolist()
        np.testing.assert_array_equal(sample["image"], one["image"])
        np.testing.assert_array_equal(sample["valid"], (one["image"] != 0).all(1))


def test_images_beyond_the_count_of_the_list_are_read(copy):
    root, truth = copy
    listed = json.loads((root / "S2list.json").read_text())["0002"]
    dataset = Sen12Flood(root, "all", select=("B02",))
    sample = dataset[dataset.names.index("0002")]
    assert listed["count"] == 8 and len(sample["dates"]) == 11 == len(truth["0002"]["s2"]["dates"])


def test_labels_stay_once_flooded_and_frames_ascend(copy):
    root, _ = copy
    dataset = Sen12Flood(root, "all", select=("B02",))
    for sample in (dataset[i] for i in range(len(dataset))):
        assert (sample["dates"].diff() > 0).all()
        assert (sample["label"].diff() >= 0).all()


def test_frames_are_each_read_once_in_every_epoch(copy):
    root, truth = copy
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    dataset = Sen12Flood(root, "all", select=("B02",))
    for _ in range(2):
        samples = [dataset[i] for i in range(len(dataset))]
        assert [len(s["dates"]) for s in samples] == [len(truth[n]["s2"]["dates"]) for n in truth]
        assert all(len(set(s["dates"].tolist())) == len(s["dates"]) for s in samples)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_parts_do_not_overlap(copy):
    root, truth = copy
    parts = {part: set(Sen12Flood(root, part).names) for part in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == len(truth)
    assert all(parts.values())
    hashes = {Sen12Flood(root, part).split_hash for part in parts}
    assert len(hashes) == 3


def test_neighbours_are_in_one_part():
    def area(column, row):
        return (column * 0.05, row * 0.05, column * 0.05 + 0.046, row * 0.05 + 0.046)

    boxes = {f"{c}{r}": area(c, r) for c in range(3) for r in range(3)}  # one block of neighbours
    boxes |= {f"far{i:02d}": area(100 + 10 * i, 0) for i in range(21)}
    parts = split_places(boxes)
    assert len({parts[name] for name in boxes if not name.startswith("far")}) == 1
    counts = {part: list(parts.values()).count(part) for part in ("train", "val", "test")}
    assert counts == {"train": 21, "val": 3, "test": 6}
    assert split_places(dict(reversed(boxes.items()))) == parts
    assert len(set(split_places({"a": None, "b": None, "c": None}).values())) > 1


def test_published_protocol_validates_on_its_test_part(copy):
    root, _ = copy
    part = {s: Sen12Flood(root, s, protocol="published").names for s in ("train", "val", "test")}
    assert part["val"] == part["test"] == ("23",)
    assert part["train"] == ("0001", "0002", "0063", "0214")


def test_order_does_not_depend_on_listings(copy, monkeypatch):
    root, _ = copy
    plain = Sen12Flood(root, select=("B02",))
    samples = [plain[i] for i in range(len(plain))]
    shuffle_listings(monkeypatch)
    path = root / "S2list.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in reversed(content)}))
    other = Sen12Flood(root, select=("B02",))
    same_samples(samples, [other[i] for i in range(len(other))])


def test_bands_by_name(copy):
    root, truth = copy
    dataset = Sen12Flood(root, "all", select=("B8A", "B02"))
    assert dataset.bands == ("B8A", "B02")
    image = truth[dataset.names[0]]["s2"]["image"]
    np.testing.assert_array_equal(dataset[0]["image"], image[:, [8, 1]])
    assert Sen12Flood(root, "all", sensor="s1", select=("VH",))[0]["image"].shape[1] == 1


def test_size_averages_valid_pixels(copy):
    root, _ = copy
    options = {"select": ("B02", "B8A")}
    whole, small = (Sen12Flood(root, "all", size=size, **options)[0] for size in (None, 4))
    validate_sample(small)
    assert small["image"].shape == (4, 2, 4, 4) and small["image"].dtype == torch.float32
    blocks = whole["image"].double().unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    valid = whole["valid"].double().unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    expected = (blocks * valid[:, None]).sum(-1) / valid.sum(-1)[:, None].clamp_min(1)
    torch.testing.assert_close(small["image"].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(small["valid"], valid.sum(-1) > 0) and not small["valid"].all()


def test_passes_on_grids_of_their_own_are_moved_onto_the_first(copy):
    root, truth = copy
    one = truth["0001"]["s1"]
    for band in ("VV", "VH"):
        path = root / "0001" / f"{one['prefixes'][1]}_corrected_{band}.tif"
        with rasterio.open(path) as file:
            pixels, profile = file.read(), file.profile
        moved = np.zeros((1, 18, 17), np.float32)
        moved[:, 2:, 1:] = pixels  # two rows more to the north, one column to the west
        shifted = profile["transform"] @ Affine.translation(-1, -2)
        profile |= {"height": 18, "width": 17, "transform": shifted}
        with rasterio.open(path, "w", **profile) as file:
            file.write(moved)
    sample = Sen12Flood(root, "all", sensor="s1")[0]
    np.testing.assert_array_equal(sample["image"], one["image"])
    np.testing.assert_array_equal(sample["valid"], (one["image"] != 0).all(1))


def test_two_passes_of_one_day_are_kept_in_the_order_of_their_times(copy):
    root, truth = copy
    first = truth["0001"]["s1"]["prefixes"][0]
    second = first.replace("T030815", "T160711").replace("S1A", "S1B")
    for band in ("VV", "VH"):
        source = root / "0001" / f"{first}_corrected_{band}.tif"
        shutil.copy(source, root / "0001" / f"{second}_corrected_{band}.tif")
    edit_list(root, "0001", lambda p: p.update({"9": p["1"] | {"filename": second}}), "S1")
    sample = Sen12Flood(root, "all", sensor="s1")[0]
    assert len(sample["dates"]) == 4 and sample["dates"][0] == sample["dates"][1]
    edit_list(root, "0001", lambda p: p.update({"10": p["9"]}), "S1")
    with pytest.raises(DataError, match="place 0001 lists S1B.* twice"):
        Sen12Flood(root, "all", sensor="s1")


def test_partial_downloads_say_what_is_missing(copy, caplog):
    root, _ = copy
    for path in (root / "0001").glob("S2_2018-12-20_B0*"):
        path.unlink()
    with pytest.raises(DataError, match="9 of .* files of the images are missing, as .*_B01.tif"):
        Sen12Flood(root, "all")
    assert len(Sen12Flood(root, "all", incomplete="skip")[0]["dates"]) == 3
    assert "9 of" in caplog.text
    (root / "S1list.json").unlink()
    with pytest.raises(DataError, match="S1list.json: cannot be read"):
        Sen12Flood(root, "all", sensor="s1")


def rewrite(path, pixels, **changes):
    with rasterio.open(path) as file:
        profile = file.profile | {"count": len(pixels), "dtype": pixels.dtype} | changes
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)


def spoil_projection(path):
    """Name the projection by bytes that are no text."""
    crs = rasterio.crs.CRS.from_wkt('LOCAL_CS["Nowhere",UNIT["metre",1]]')
    rewrite(path, np.ones((1, 16, 16), "uint16"), crs=crs)
    path.write_bytes(path.read_bytes().replace(b"Nowhere", b"Nowh\xd6re"))


BAD = {
    "name of projection": (spoil_projection, "cannot be read"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:500]), "cannot be read"),
    "dtype": (lambda p: rewrite(p, np.ones((1, 16, 16), "float32")), "dtype"),
    "bands": (lambda p: rewrite(p, np.ones((3, 16, 16), "uint16")), "band count"),
    "size": (lambda p: rewrite(p, np.ones((1, 8, 16), "uint16"), height=8), "size"),
    "zone": (lambda p: rewrite(p, np.ones((1, 16, 16), "uint16"), crs="EPSG:32737"), "grid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(copy, case):
    root, _ = copy
    spoil, says = BAD[case]
    spoil(root / "0001" / "S2_2018-12-30_B04.tif")
    with pytest.raises(DataError, match=says) as caught:
        Sen12Flood(root, "all")[0]
    assert "S2_2018-12-30_B04.tif" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"folder": "../0002"}, "outside"),
        ({"folder": "/etc"}, "outside"),
        ({"1": {"date": "2018-12-20", "FLOODING": True, "filename": "../0002/S2_x"}}, "outside"),
        ({"1": {"date": "2018-12-20", "FLOODING": True, "filename": "/etc/passwd"}}, "outside"),
        ({"1": {"date": "2018-12-20", "FLOODING": "no", "filename": "a"}}, "true or false"),
        ({"1": {"date": "2018-12-20", "FLOODING": 2, "filename": "a"}}, "true or false"),
        ({"1": {"date": "2018-13-20", "FLOODING": True, "filename": "a"}}, "must have date"),
        ({"1": {"date": 20181220, "FLOODING": True, "filename": "a"}}, "must have date"),
        ({"1": {"FLOODING": True, "filename": "a"}}, "must have date"),
        ({"1": None}, "must have date"),
        ({"geo": {"type": "Point", "coordinates": []}}, "geo of place 0001"),
        ({"geo": None}, "geo of place 0001"),
    ],
)
def test_bad_lists_are_named(copy, change, says):
    root, _ = copy
    edit_list(root, "0001", lambda place: place.update(change))
    with pytest.raises(DataError, match=says) as caught:
        for split in ("train", "val", "test"):
            Sen12Flood(root, split)
    assert "S2list.json" in str(caught.value)


@pytest.mark.parametrize("text", ["[]", '{"0001": 3}', "{", '{"0001": {}}', "[" * 100_000])
def test_lists_of_another_form_are_named(copy, text):
    root, _ = copy
    (root / "S2list.json").write_text(text)
    with pytest.raises(DataError, match="S2list.json"):
        Sen12Flood(root, "all")


def test_bad_arguments(copy):
    root, _ = copy
    for options, says in (
        ({"split": "odd"}, "split: must be one of"),
        ({"sensor": "S2"}, "sensor: must be one of s2, s1"),
        ({"size": 0}, "size: must be at least 1"),
        ({"protocol": "odd"}, "protocol: must be one of sound, published"),
    ):
        with pytest.raises(ValueError, match=says):
            Sen12Flood(root, **options)


def test_workers_give_the_same_samples(shared):
    same_with_workers(Sen12Flood(shared, "all", sensor="s1"))


def test_data_check_finds_it_fit(copy):
    root, _ = copy
    report = check_dataset(open_dataset("sen12_flood", root, select=("B04", "B03", "B02")))
    assert report.ok, str(report)
    assert set(report.labels) == {0, 1}


@fuzz
@given(
    damage=damages,
    name=st.sampled_from(["0001/S2_2018-12-20_B02.tif", "0001/S2_2018-12-30_B02.tif", "list"]),
)
def test_damaged_files_are_refused_or_harmless(shared, damage, name):
    path = shared / "S2list.json" if name == "list" else shared / name
    read_damaged(path, damage, lambda: Sen12Flood(shared, "all", select=("B02", "B03")))
