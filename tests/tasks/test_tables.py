"""Rows of series and of dates: embeddings, classes, and their picture."""

import csv

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from tests.tasks.test_tasks import SMALL, UNITS
from timo.data import SeriesDataset, physical
from timo.tasks import (
    ClassificationTask,
    PretrainingTask,
    SegmentationTask,
    embed_series,
    predict_classes,
)
from timo.tasks.tables import picture

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
        sample["valid"][:, :32] &= index % 2 == 0
        if index == 4:
            sample["valid"][1] = False
        if not self.clear:
            sample["valid"][:] = False
        if self.window:
            sample["window"] = (index, 2 * index)
        if self.labelled_by == "series":
            sample["label"] = torch.tensor(index % 2)
        if self.labelled_by == "date":
            sample["label"] = index % 2 + torch.arange(t) % 2
        return sample


def tasks() -> list:
    torch.manual_seed(0)
    units = {**UNITS, "scale": [0.01] * 2, "offset": [-0.5] * 2}
    options = {"model": "timo_tiny", "model_options": SMALL, "classes": ("a", "b", "c")}
    made = [
        PretrainingTask(("x", "y"), **units, model="timo_tiny", model_options=SMALL | DECODER),
        SegmentationTask(("x", "y"), **units, **options),
        ClassificationTask(("x", "y"), **units, **options),
    ]
    return [task.eval() for task in made]


@torch.no_grad()
def alone(task, sample: dict) -> torch.Tensor:
    """The last map of one sample by itself, (T, D, h, w), NaN where no pixel is valid."""
    frames = physical(sample["image"], *task.input_units())[None]
    last = task.model.encoder(frames, sample["dates"][None], sample["valid"][None])[3][0]
    blocks = torch.nn.functional.pad(sample["valid"], (0, 24)).unflatten(1, (2, 32))
    usable = blocks.unflatten(3, (2, 32)).any(4).any(2)  # [T, h, w]
    return last.where(usable[:, None], torch.nan)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("per_frame", [False, True])
def test_embeddings_are_means_of_valid_tokens(kind, per_frame):
    task, dataset = tasks()[kind], Cut()
    table = embed_series(task, dataset, per_frame, batch_size=3)
    assert set(table) == {"embedding", "name", "start", "end", "window"}
    rows = []
    for index in range(len(dataset)):
        last, days = alone(task, dataset[index]), dataset[index]["dates"].tolist()
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
        each = [dataset[i]["label"].reshape(-1) for i in range(len(dataset))]
        assert table["label"].tolist() == torch.cat(each).tolist()
    else:
        assert "label" not in table


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


@pytest.mark.parametrize("clear, labelled_by", [(True, None), (True, "series"), (False, None)])
def test_a_picture_of_any_table(tmp_path, clear, labelled_by):
    table = embed_series(tasks()[0], Cut(labelled_by, clear=clear))
    picture(table, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0.05
    for rows in (1, 2):
        picture({name: column[:rows] for name, column in table.items()}, tmp_path / "a.png")
