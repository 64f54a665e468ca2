"""labels.csv: classes of series and of dates, beside rasters and arrays."""

import numpy as np
import pytest
import torch

from tests.data.writers import frames, write_numpy, write_rasters, write_tif
from timo.data import (
    DataError,
    NumpySeries,
    RasterSeries,
    check_dataset,
    collate_series,
    validate_sample,
)
from timo.tasks import ClassificationTask, SeriesData

NAMES = ["2020", "201807", "20190105_x"]  # 2018-07-15, 2019-01-05, 2020-07-01
SMALL = {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}


@pytest.fixture
def root(tmp_path):
    write_rasters(tmp_path / "a", NAMES, frames(3))
    write_rasters(tmp_path / "b, c", NAMES[1:], frames(2))
    return tmp_path


def write(folder, *lines):
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def test_labels_of_series(root):
    write(root, "name,label", "elsewhere,x", '"b, c", 2', "", "a,254")
    data = RasterSeries(root, tile=32)
    for sample in data:
        validate_sample(sample)
        assert sample["label"].tolist() == {"a": 254, "b, c": 2}[sample["name"]]
    assert [s["label"].tolist() for s in RasterSeries(root, samples=["b, c"])] == [2]
    assert collate_series([data[0], data[len(data) - 1]])["label"].tolist() == [254, 2]
    assert check_dataset(data).labels == {2: len(data) // 2, 254: len(data) // 2}


def test_labels_of_dates(root):
    write(root, "name,date,label", "a,2020-07-01,1", "a,201807,0", '"b, c",20190105,255')
    first, second = RasterSeries(root)
    validate_sample(first)
    assert first["label"].tolist() == [0, 255, 1] and second["label"].tolist() == [255, 255]
    first["label"][:] = 7  # a copy
    assert RasterSeries(root)[0]["label"].tolist() == [0, 255, 1]
    data = SeriesData(RasterSeries(root), batch_size=2, dates=2, augment=False)
    for sample in data.train:
        assert len(sample["label"]) == len(sample["dates"]) == 2
        for day, label in zip(sample["dates"].tolist(), sample["label"].tolist()):
            known = {17727: 0, 18444: 1} if sample["name"] == "a" else {}
            assert label == known.get(day, 255)


def test_labels_of_arrays(tmp_path):
    pixels = frames(2)
    for name in ("x", "y"):
        write_numpy(tmp_path / name, pixels, ["2020-01-05", "2019-03-04"])
    write(tmp_path, "name,date,label", "x,2020-01-05,3", "x,2019-03-04,4", "y,2019-03-04,5")
    assert [s["label"].tolist() for s in NumpySeries(tmp_path)] == [[4, 3], [5, 255]]
    one = NumpySeries(tmp_path / "x" / "series.npy", dates="dates.json")
    assert "label" not in one[0]


def test_a_classifier_learns_from_them(root):
    write(root, "name,label", "a,0", '"b, c",1')
    data = RasterSeries(root)
    task = ClassificationTask(
        data.bands, **SeriesData(data).normalisation(), classes=("no", "yes"), model="timo_tiny",
        model_options=SMALL,
    )  # fmt: skip
    batch = collate_series(list(data))
    task.check_labels(batch)
    assert task.labels_of(batch).tolist() == [0, 1]
    assert torch.isfinite(task.loss(task(batch), task.labels_of(batch)))
    task.per_frame = True
    with pytest.raises(
        DataError, match="series a, b, c: has a label for the series, but the model "
    ):
        task.check_labels(batch)


def test_a_label_of_no_class_is_named_with_its_date(root):
    write(root, "name,date,label", "a,2020-07-01,1", "a,201807,9", '"b, c",20190105,0')
    data = RasterSeries(root, samples=["a"])
    task = ClassificationTask(
        data.bands, **SeriesData(data).normalisation(), classes=("no", "yes"), per_frame=True,
        model="timo_tiny", model_options=SMALL,
    )  # fmt: skip
    with pytest.raises(DataError, match="series a, 2018-07-15: has the label 9, but the classes"):
        task.check_labels(collate_series(list(data)))


@pytest.mark.parametrize("lines, words", [
    ([], "first line is ''; it must be name,label, for labels of series, or name,date,label"),
    (["name,class", "a,1"], "first line is 'name,class'; it must be name,label"),
    (["name,label", "a,1"], "does not list the series b, c; add them, with label 255"),
    (["name,label", "a,1", "a,1"], "line 3: a was listed before"),
    (["name,label", "a,water"], "line 2: label 'water' is no number in 0 ... 255; number the"),
    (["name,label", "a,256"], "line 2: label '256' is no number"),
    (["name,label", "a,-1"], "line 2: label '-1' is no number"),
    (["name,label", "a"], "line 2: it has 1 entries, the first line 2"),
    (["name,label", "a,1,2"], "line 2: it has 3 entries, the first line 2"),
    (["name,date,label", "a,2020-07-02,1"], "line 2: series 'a' has no acquisition of 2020-07-02"),
    (["name,date,label", "a,soon,1"], "line 2: 'soon' is none of YYYY"),
    (["name,date,label", "a,2020,1", "a,2020-07-01,0"], "line 3: a 2020-07-01 was listed before"),
])  # fmt: skip
def test_what_does_not_fit_is_named(root, lines, words):
    write(root, *lines)
    with pytest.raises(DataError) as error:
        RasterSeries(root)
    assert f"{root / 'labels.csv'}" in str(error.value) and words in str(error.value)


def test_either_a_mask_or_a_label(root):
    write(root, "name,label", "a,0", '"b, c",1')
    write_tif(root / "a" / "mask.tif", np.ones((40, 50), np.uint8))
    with pytest.raises(DataError, match="series 'a': has a mask, and a label in labels.csv; move"):
        RasterSeries(root)[0]


def test_a_table_that_is_no_text(root):
    (root / "labels.csv").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(DataError, match="labels.csv: cannot be read as CSV"):
        RasterSeries(root)
