"""Rows of series and of dates: embeddings, classes, and their picture."""

import csv
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.data.corpora import write_published_layout
from tests.data.writers import frames, write_rasters
from tests.tasks.test_tasks import SMALL, UNITS
from timo.data import DataError, RasterSeries, SeriesDataset, open_series, physical
from timo.data.building import SeriesSource, build_store
from timo.tasks import (
    ClassificationTask,
    PretrainingTask,
    SegmentationTask,
    embed_series,
    pictures,
    predict_classes,
)
from timo.tasks.pictures import embedding_picture as picture

DECODER = {"decoder_embed_dim": 16, "decoder_num_heads": 2, "decoder_depth": 1}


class Cut(SeriesDataset):
    """Windows of one to three dates with clouds; the last has no valid pixel at its second date."""

    def __init__(self, labelled_by: str | None = None, window: bool = True, clear: bool = True):
        super().__init__(("x", "y"), scale=0.01, offset=-0.5)
        self.labelled_by, self.window, self.clear = labelled_by, window, clear

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        t = 1 + (index + 1) % 3
        sample = {
            "image": torch.randint(0, 256, (t, 2, 64, 40), dtype=torch.uint8, generator=generator),
            "dates": 100 * index + 10 * torch.arange(t),
            "valid": torch.rand(t, 64, 40, generator=generator) > 0.3,
            "name": f"series {index}",
        }
        if index == 1:  # what samples hold besides may differ
            sample["mask"] = torch.zeros(64, 40, dtype=torch.int64)
        sample["valid"][:, :32] &= index % 2 == 0
        if index == 4:
            sample["valid"][1] = False
        if not self.clear:
            sample["valid"][:] = False
        if self.window:
            sample["window"] = (torch.tensor(index), 2 * index)
        if self.labelled_by == "series" and index != 2:
            sample["label"] = torch.tensor(index % 2)
        if self.labelled_by == "date":
            sample["label"] = index % 2 + torch.arange(t) % 2
        return sample


def tasks() -> list:
    """A task of each kind, on other raw units than those of the data, and coding dates by days."""
    torch.manual_seed(0)
    units, shape = {**UNITS, "scale": [1.0, 1.0]}, SMALL | {"temporal_position": "days"}
    options = {"model": "timo_tiny", "model_options": shape, "classes": ("a", "b", "c")}
    made = [
        PretrainingTask(("x", "y"), **units, model="timo_tiny", model_options=shape | DECODER),
        SegmentationTask(("x", "y"), **units, **options),
        ClassificationTask(("x", "y"), **units, **options),
    ]
    return [task.eval() for task in made]


@torch.no_grad()
def alone(task, dataset: SeriesDataset, sample: dict) -> torch.Tensor:
    """The last map of one sample by itself, (T, D, h, w), NaN where no pixel is valid."""
    task.read_from(dataset)
    frames = physical(sample["image"], *task.input_units())[None]
    last = task.model.encoder(frames, sample["dates"][None], sample["valid"][None])[3][0]
    high, wide = sample["valid"].shape[1:]
    blocks = F.pad(sample["valid"], (0, -wide % 32, 0, -high % 32)).unflatten(1, (-1, 32))
    usable = blocks.unflatten(3, (-1, 32)).any(4).any(2)  # [T, h, w]
    return last.where(usable[:, None], torch.nan)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("per_frame", [False, True])
def test_embeddings_are_means_of_valid_tokens(kind, per_frame):
    task, dataset = tasks()[kind], Cut()
    table = embed_series(task, dataset, per_frame, batch_size=3)
    assert set(table) == {"embedding", "name", "start", "end", "window"}
    rows = []
    for index in range(len(dataset)):
        last, days = alone(task, dataset, dataset[index]), dataset[index]["dates"].tolist()
        parts = zip(last[:, None], days, days) if per_frame else [(last, days[0], days[-1])]
        for part, first, end in parts:
            rows.append((part.nanmean((0, 2, 3)), f"series {index}", first, end, index))
    assert table["embedding"].dtype == np.float32 and len(table["embedding"]) == len(rows)
    assert np.isnan(table["embedding"]).any(1).sum() == (1 if per_frame else 0)
    for i, (vector, name, first, end, index) in enumerate(rows):
        torch.testing.assert_close(
            torch.from_numpy(table["embedding"][i]), vector, equal_nan=True, rtol=1e-4, atol=1e-5
        )
        assert table["name"][i] == name and tuple(table["window"][i]) == (index, 2 * index)
        assert table["start"][i] == np.datetime64(first, "D")
        assert table["end"][i] == np.datetime64(end, "D")


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("labelled_by", ["series", "date", None])
def test_labels_are_kept_where_a_row_is_what_they_are_of(labelled_by, per_frame):
    dataset = Cut(labelled_by, window=False)
    table = embed_series(tasks()[2], dataset, per_frame)
    assert "window" not in table
    if labelled_by == ("date" if per_frame else "series"):
        none = torch.tensor(255)
        each = [dataset[i].get("label", none).reshape(-1) for i in range(len(dataset))]
        assert table["label"].tolist() == torch.cat(each).tolist()
        assert table["label"].dtype == np.int64
    else:
        assert "label" not in table


def test_a_store_is_embedded(tmp_path):
    source = SeriesSource(open_series(write_published_layout(tmp_path / "in", 3, size=40)))
    build_store(source, tmp_path / "store")
    store = open_series(tmp_path / "store")
    task = PretrainingTask(
        store.bands, [100.0] * 3, [50.0] * 3, store.scale, store.offset, model="timo_tiny",
        model_options=SMALL | DECODER,
    ).eval()  # fmt: skip
    table = embed_series(task, store, batch_size=2)
    for index in range(3):
        sample = store[index]
        expected = alone(task, store, sample).nanmean((0, 2, 3))
        torch.testing.assert_close(torch.from_numpy(table["embedding"][index]), expected)
        assert table["name"][index] == sample["name"]


def test_places_of_embeddings(tmp_path):
    """Bounds of windows in the raster's own coordinates: pixels of 10 m, north is up."""
    for name in ("a", "b"):
        write_rasters(tmp_path / name, ["2020"], frames(1, 2, 64, 80, "uint8"))
    task, dataset = tasks()[0], RasterSeries(tmp_path, bands=["x", "y"], scale=0.01, tile=48)
    table = embed_series(task, dataset)
    windows = table["window"]
    assert windows.tolist() == [[0, 0], [0, 32], [16, 0], [16, 32]] * 2
    left, top = 500_000 + 10 * windows[:, 1], 9_000_000 - 10 * windows[:, 0]
    np.testing.assert_array_equal(table["bounds"], np.stack([left, top - 480, left + 480, top], 1))
    assert table["crs"].tolist() == ["EPSG:32718"] * 8
    whole = embed_series(task, RasterSeries(tmp_path, bands=["x", "y"], scale=0.01))
    assert whole["bounds"].tolist() == [[500_000, 9_000_000 - 640, 500_800, 9_000_000]] * 2
    assert len(np.unique(points_of(picture(table))[:, 2:], axis=0)) == 2  # a colour for each series


def test_what_cannot_be_embedded_is_told():
    task, dataset = tasks()[0], Cut()
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        embed_series(task, dataset, batch_size=0)
    task.bands = ("y", "x")
    with pytest.raises(DataError, match="this model reads"):
        embed_series(task, dataset)
    task.bands = ("x", "y")
    task.model.encoder.stage4.norm.weight.data[3] = torch.nan
    with pytest.raises(DataError, match="series series 0: the model gives values that are not fin"):
        embed_series(task, dataset)
    assert np.isnan(embed_series(task, Cut(clear=False))["embedding"]).all()
    Cut.__len__, length = lambda self: 0, Cut.__len__
    try:
        with pytest.raises(DataError, match="data: holds no samples"):
            embed_series(task, dataset)
    finally:
        Cut.__len__ = length


def test_classes_are_those_of_the_logits(tmp_path):
    torch.manual_seed(1)
    task, dataset = tasks()[2], Cut()
    task.model.head.weight.data.normal_()
    predict_classes(task, dataset, tmp_path / "classes.csv", batch_size=2)
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "row", "column", "start", "end", "class", "a", "b", "c"]
    for index, row in enumerate(rows):
        sample = dataset[index]
        batch = {k: sample[k][None] for k in ("image", "dates", "valid")}
        days = sample["dates"].numpy().astype("datetime64[D]")
        assert (row["start"], row["end"]) == (str(days[0]), str(days[-1]))
        with torch.no_grad():
            shares = task(batch).softmax(-1)[0]
        assert [float(row[name]) for name in "abc"] == pytest.approx(shares.tolist(), abs=2e-5)
        assert row["class"] == "abc"[int(shares.argmax())]
        assert (row["name"], row["row"], row["column"]) == (
            f"series {index}", str(index), str(2 * index),
        )  # fmt: skip
    assert len({row["class"] for row in rows}) > 1, "the comparison above would pass for any class"
    predict_classes(task, Cut(clear=False, window=False), tmp_path / "clouds.csv")
    with open(tmp_path / "clouds.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert {row[key] for key in ("row", "column", "class", "a", "b", "c")} == {""}
            assert row["start"].startswith("197")


def points_of(drawn) -> np.ndarray:
    """Positions and colours of a figure's points, (R, 2 + 4)."""
    drawn.canvas.draw()
    found = [
        [(*place, *colour) for place, colour in zip(dots.get_offsets(), itertools.cycle(colours))]
        for dots in drawn.axes[0].collections
        if len(colours := dots.get_facecolors())
    ]
    return np.vstack(found)


def test_a_picture_shows_principal_components(monkeypatch):
    rng = np.random.default_rng(0)
    x = np.zeros((40, 5), np.float32)
    x[:, 3], x[:, 1] = 10 * rng.standard_normal(40), rng.standard_normal(40)
    x[7] = np.nan
    days = np.arange(40).astype("datetime64[D]")
    table = {"embedding": x, "name": np.array(["a"] * 40), "start": days, "end": days}
    shown = points_of(picture(table))
    known = np.delete(x, 7, 0)
    distances = np.linalg.norm(known[:, None] - known[None], axis=2)
    found = np.linalg.norm(shown[:, None, :2] - shown[None, :, :2], axis=2)
    np.testing.assert_allclose(found, distances, rtol=1e-4, atol=1e-4)
    assert len(np.unique(shown[:, 2:], axis=0)) > 20  # by date
    table["label"] = np.arange(40) % 4
    table["label"][20:] = 255
    coloured = np.unique(points_of(picture(table))[:, 2:], axis=0)
    assert len(coloured) == 5  # four labels, and none
    table["label"] = np.arange(40)
    assert len(np.unique(points_of(picture(table))[:, 2:], axis=0)) == 39
    monkeypatch.setattr(pictures, "POINTS", 10)
    assert len(points_of(picture(table))) == 10
    for rows in (1, 2):
        few = {name: column[:rows] for name, column in table.items()}
        assert np.isfinite(points_of(picture(few))).all()
    nothing = picture({name: column[7:8] for name, column in table.items()})
    assert not nothing.axes[0].collections
