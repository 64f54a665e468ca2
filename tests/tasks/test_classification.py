"""Classification of series and of dates, below the command and through it."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.data.fixtures import sen12_flood
from timo.cli import main
from timo.data import DataError, SeriesDataset, collate_series
from timo.data.readers import Sen12Flood
from timo.tasks import ClassificationTask, SegmentationTask, load_segmenter, load_task
from timo.tasks.data import compact_valid
from timo.tasks.runs import save_model

SMALL = {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
UNITS = {"mean": [0.2, 0.3], "deviation": [0.1, 0.2], "scale": [1.0, 1.0], "offset": [0.0, 0.0]}


def classification(**options) -> ClassificationTask:
    options = {"model_options": SMALL, "classes": ("a", "b", "c"), **options}
    return ClassificationTask(("x", "y"), **UNITS, model="timo_tiny", **options)


def batch_of(per_frame=True, t=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(2, t, 2, 32, 32, generator=generator),
        "dates": torch.arange(2 * t).view(2, t),
        "valid": torch.ones(2, t, 32, 32, dtype=torch.bool),
        "label": torch.tensor([[0, 1, 2], [2, 255, 1]]) if per_frame else torch.tensor([2, 0]),
    }


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_loss_is_cross_entropy_of_what_is_labelled(per_frame, weights):
    torch.manual_seed(0)
    task = classification(per_frame=per_frame, class_weights=weights).eval()
    batch = batch_of(per_frame)
    logits = task(batch)
    assert logits.shape == ((2, 3, 3) if per_frame else (2, 3))
    expected = F.cross_entropy(
        logits.reshape(-1, 3), batch["label"].reshape(-1),
        None if weights is None else torch.tensor(weights), ignore_index=255,
    )  # fmt: skip
    torch.testing.assert_close(task.loss(logits, task.labels_of(batch)), expected)
    assert task.loss(logits, torch.full_like(batch["label"], 255)) == 0


@pytest.mark.parametrize("form", ["none", "dates", "pixels"])
def test_dates_without_a_valid_pixel_are_left_out(form):
    task = classification(per_frame=True)
    batch = batch_of()
    if form != "none":
        batch["valid"][0, 1] = False
    if form == "pixels":
        batch["valid"][1, 2, :16] = False
    batch["valid"] = compact_valid(batch["valid"])
    assert (batch["valid"] is None) == (form == "none")
    labels = task.labels_of(batch)
    assert labels.tolist() == [[0, 1 if form == "none" else 255, 2], [2, 255, 1]]
    assert batch["label"][0, 1] == 1, "the batch itself was changed"


@pytest.mark.parametrize("form", ["dates", "pixels"])
def test_series_without_a_valid_pixel_are_left_out(form):
    batch = batch_of(per_frame=False)
    batch["valid"][0] = False
    batch["valid"][1, 1, : 32 if form == "dates" else 16] = False
    batch["valid"] = compact_valid(batch["valid"])
    assert classification().labels_of(batch).tolist() == [255, 0]


def test_padded_dates_change_nothing():
    torch.manual_seed(0)
    task = classification(per_frame=True).eval()
    one = {"image": torch.randn(2, 2, 32, 32), "dates": torch.arange(2), "name": "a"}
    one |= {"valid": torch.ones(2, 32, 32, dtype=torch.bool), "label": torch.tensor([0, 2])}
    longer = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in one.items() if k != "name"}
    batch = collate_series([one, longer | {"dates": torch.arange(4), "name": "b"}])
    batch["valid"] = compact_valid(batch["valid"])
    alone = collate_series([one]) | {"valid": None}
    with torch.no_grad():
        padded, plain = task(batch)[:1, :2], task(alone)
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)
    assert task.labels_of(batch)[0].tolist() == [0, 2, 255, 255]


def test_labels_and_model_must_agree():
    batch, series = batch_of(), batch_of(per_frame=False)
    with pytest.raises(ValueError, match="labels of series need per_frame=False"):
        classification().loss(torch.randn(2, 3), batch["label"])
    with pytest.raises(ValueError, match="labels of dates per_frame=True"):
        classification(per_frame=True).loss(torch.randn(2, 3, 3), series["label"])


def test_metrics_against_counts():
    task = classification(per_frame=True)
    labels = torch.tensor([[0, 0, 1, 1, 1, 255]])
    predicted = torch.tensor([[0, 1, 1, 1, 0, 1]])
    logits = F.one_hot(predicted, 3).float()
    task.test_metrics.update(*task.flat(logits, labels))
    values = task.test_metrics.compute()
    assert values["test/accuracy"] == pytest.approx(3 / 5)
    nan = float("nan")  # class 2 does not occur
    assert values["test/f1"].tolist() == pytest.approx([0.5, 2 / 3, nan], nan_ok=True)
    assert values["test/mean_f1"] == pytest.approx((0.5 + 2 / 3) / 2)


def test_a_task_is_loaded_as_what_it_is(tmp_path):
    class Series(SeriesDataset):
        """One sample near what the task was trained on."""

        def __init__(self, units="dB", value=0.3, valid=True, nodata=0, spread=0.03):
            super().__init__(("x", "y"), units)
            self.spread = spread
            if nodata != "not said":
                self.nodata = nodata
            self.value, self.valid = value, torch.full((1, 32, 32), valid)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            if index:
                raise IndexError
            image = self.value + self.spread * torch.randn(1, 2, 32, 32)
            return {
                "image": image,
                "dates": torch.zeros(1).long(),
                "valid": self.valid,
                "name": "s",
            }

    Data = Series()
    task = classification(per_frame=True).eval()
    task.units, task.nodata = "dB", 0.0
    save_model(task, tmp_path)
    again = load_task(tmp_path, Data)
    assert isinstance(again, ClassificationTask) and again.per_frame
    batch = batch_of()
    torch.testing.assert_close(again(batch), task(batch))
    with pytest.raises(DataError, match="classification run, which maps nothing"):
        load_segmenter(tmp_path, Data)
    (tmp_path / "b").mkdir()
    options = {"model_options": SMALL, "classes": ("a", "b"), "model": "timo_tiny"}
    save_model(SegmentationTask(("x", "y"), **UNITS, **options), tmp_path / "b")
    assert isinstance(load_segmenter(tmp_path / "b", Data), SegmentationTask)
    with pytest.raises(DataError, match="values in linear; this model was trained on dB: state"):
        load_task(tmp_path, Series("linear"))
    with pytest.warns(UserWarning, match=r"band x has values of 30 on average, .* 0.2 ± 0.1; res"):
        load_task(tmp_path, Series(value=30.0, spread=0))
    with pytest.warns(UserWarning, match=r"band x vary by 0.00.* trained on by 0.1, and .* units="):
        load_task(tmp_path, Series(spread=0.003))
    with pytest.warns(
        UserWarning, match="no nodata value.*; in training it was 0. .*data.nodata 0 "
    ):
        load_task(tmp_path, Series(nodata=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(tmp_path, Series(value=30.0, valid=False))  # of which nothing can be said
        load_task(tmp_path, Data)
        load_task(tmp_path, Series(nodata=7))
        load_task(tmp_path, Series(nodata="not said"))
        load_task(tmp_path / "b", Series(nodata=None))
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path)
    with pytest.raises(DataError, match="model.safetensors: is not of this run, by .* and .* more"):
        load_task(tmp_path, Data)
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "task.json").write_text(damaged)
        with pytest.raises(DataError, match="task.json: is damaged"):
            load_task(tmp_path, Data)
    whole = json.loads((tmp_path / "b" / "task.json").read_text())
    save_model(classification(per_frame=True), tmp_path)
    for key, value in (("mean", [0.2]), ("deviation", [0.1, 0.0]), ("bands", [1]), ("more", 1)):
        (tmp_path / "task.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(DataError, match="task.json: is damaged"):
            load_task(tmp_path, Data)
    for key, value in (("kind", "detection"), ("kind", None), ("classes", None)):
        damaged = {k: v for k, v in (whole | {key: value}).items() if v is not None}
        (tmp_path / "task.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=r"task.json: is damaged \(kind is .*copy it again"):
            load_task(tmp_path, Data)


def test_the_commands_choose_classification(tmp_path, capsys):
    sen12_flood.write(tmp_path / "data", size=32)

    def run(*arguments):
        return main([str(a) for a in arguments])

    def data(name, split):
        options = {"root": tmp_path / "data", "split": split, "select": "[B04, B08]"}
        return [f"--{name}", "Sen12Flood"] + [
            part for key, value in options.items() for part in (f"--{name}.{key}", value)
        ]

    out = tmp_path / "run"
    assert run(
        "finetune", "--out", out, *data("data.train", "train"), *data("data.val", "val"),
        "--data.batch_size", 2, "--data.dates", 3, "--task.model", "timo_tiny",
        "--task.model_options", json.dumps(SMALL), "--trainer.max_steps", 2,
        "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false",
    ) == 0, capsys.readouterr().err  # fmt: skip
    said = capsys.readouterr().out
    assert "val/accuracy" in said and "val/f1/flood" in said
    described = json.loads((out / "task.json").read_text())
    assert described["kind"] == "classification" and described["per_frame"]
    assert described["classes"] == list(Sen12Flood(tmp_path / "data").classes)
    assert "weight_decay: 0.05" in (out / "config.yaml").read_text()
    scores = tmp_path / "scores.json"
    assert run("evaluate", "--run", out, *data("data", "test"), "--accelerator", "cpu",
               "--out", scores) == 0, capsys.readouterr().err  # fmt: skip
    assert {"test/accuracy", "test/f1/flood", "test/mean_f1"} <= set(json.loads(scores.read_text()))
    cpu = ("--accelerator", "cpu", "--out", tmp_path / "listed")
    assert run("predict", "--run", out, *data("data", "test"), *cpu) == 0
    rows = (tmp_path / "listed" / "predictions.csv").read_text().splitlines()
    test = Sen12Flood(tmp_path / "data", split="test", select=["B04", "B08"])
    assert rows[0] == f"name,row,column,start,end,class,{','.join(test.classes)}"
    assert len(rows) == 1 + sum(len(test[i]["dates"]) for i in range(len(test)))
    assert run("embed", "--run", out, *data("data", "test"), "--per_frame", "true", *cpu) == 0
    with np.load(tmp_path / "listed" / "embeddings.npz") as table:
        labels = torch.cat([test[i]["label"] for i in range(len(test))])
        assert table["label"].tolist() == labels.tolist()
    capsys.readouterr()
    for wrong, words in (
        (("predict", "--change", "true"), "change is True, which is of maps"),
        (("predict", "--accelerator", "tpu"), "accelerator is 'tpu'; it must be cpu, gpu or auto"),
        (("predict", "--tile", 32), "tile is 32, which is of maps"),
        (("predict", "--overlap", 0), "overlap is 0, which is of maps"),
        (("predict", "--out", scores), f"out: {scores} is a file; name a folder"),
        (("embed", "--run", tmp_path), f"{tmp_path / 'task.json'}: does not exist"),
        (("embed", "--out", out), f"out: {out} is the folder of a run"),
        (("embed", "--out", scores), f"out: {scores} is a file; name a folder"),
    ):  # fmt: skip
        assert run(wrong[0], "--run", out, *data("data", "test"), *cpu, *wrong[1:]) == 2
        assert words in capsys.readouterr().err
