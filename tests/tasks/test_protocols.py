"""Protocols of published data sets: scores, splits that do not leak, their record in a run."""

import json

import numpy as np
import pytest
import torch

from tests.data.fixtures import mtlcc
from timo.cli.main import main
from timo.data import DataError
from timo.data.readers import MTLCC
from timo.tasks import SegmentationTask, SeriesData

SMALL = {"embed_dims": [8] * 4, "num_heads": [1] * 4, "depths": [1] * 4}


def segmentation(scores: str) -> SegmentationTask:
    return SegmentationTask(
        ("x",), [0.0], [1.0], [1.0], [0.0], ("a", "b", "c", "d"), model="timo_tiny",
        model_options=SMALL, scores=scores,
    )  # fmt: skip


def test_scores_by_hand():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(3, (2, 9, 11), generator=generator)  # d never occurs
    mask[0, :2] = 255
    logits = torch.randn(2, 4, 9, 11, generator=generator)
    logits[:, 3] = -9
    metrics = segmentation("weighted").metrics()
    for image, labels in zip(logits, mask):  # batches accumulate
        metrics.update(image[None], labels[None])
    found = {name: value.tolist() for name, value in metrics.compute().items()}

    labelled = mask != 255
    truth, guess = mask[labelled].numpy(), logits.argmax(1)[labelled].numpy()
    hits = np.array([((truth == c) & (guess == c)).sum() for c in range(3)])
    held = np.array([(truth == c).sum() for c in range(3)])
    said = np.array([(guess == c).sum() for c in range(3)])
    iou, f1 = hits / (held + said - hits), 2 * hits / (held + said)
    share = held / held.sum()
    expected = {
        "iou": [*iou, np.nan],
        "f1": [*f1, np.nan],
        "mean_iou": iou.mean(),
        "mean_f1": f1.mean(),
        "accuracy": hits.sum() / held.sum(),
        "weighted_precision": (share * hits / said).sum(),
        "weighted_recall": (share * hits / held).sum(),
        "weighted_f1": (share * f1).sum(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match='scores is .best.; it must be "mean" or "weighted"'):
        segmentation("best")


def test_a_sample_in_two_parts_is_refused(tmp_path):
    mtlcc.write(tmp_path)
    train, val, whole = (MTLCC(tmp_path, split) for split in ("train", "val", "all"))
    with pytest.raises(DataError, match="val: holds sample 'data/101' .* which train holds too"):
        SeriesData(train, whole)
    with pytest.raises(DataError, match="test: holds sample 'data/3' .* which val holds too"):
        SeriesData(train, val, MTLCC(tmp_path, "val"))
    splits = SeriesData(train, val, MTLCC(tmp_path, "test")).splits()
    assert splits["val"] == {
        "dataset": "MTLCC",
        "samples": 2,
        "split": "val",
        "split_hash": val.split_hash,
    }


def test_a_run_records_its_splits(tmp_path, capsys):
    root = tmp_path / "mtlcc"
    mtlcc.write(root)
    options = {
        "data.train": "MTLCC",
        "data.train.root": root,
        "data.train.select": '["B02", "B08"]',
        "data.val": "MTLCC",
        "data.val.root": root,
        "data.val.split": "val",
        "data.val.select": '["B02", "B08"]',
        "data.batch_size": 2,
        "task.model": "timo_tiny",
        "task.model_options": json.dumps(SMALL),
        "task.scores": "weighted",
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_model_summary": "false",
        "out": tmp_path / "run",
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["finetune", *arguments]) == 0
    record = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert {part: one["split_hash"] for part, one in record.items()} == {
        part: MTLCC(root, part).split_hash for part in ("train", "val")
    }
    assert "val/weighted_f1" in capsys.readouterr().out
    described = json.loads((tmp_path / "run" / "task.json").read_text())
    assert described["classes"][0] == "sugar beet" and described["scores"] == "weighted"
    scores = tmp_path / "scores.json"
    assert main([
        "evaluate", "--run", str(tmp_path / "run"), "--data", "MTLCC", "--data.root", str(root),
        "--data.split", "test", "--data.select", '["B02", "B08"]', "--accelerator", "cpu",
        "--out", str(scores),
    ]) == 0  # fmt: skip
    scores = json.loads(scores.read_text())
    assert 0 <= scores["test/weighted_precision"] <= 1
    assert scores["data"]["split_hash"] == MTLCC(root, "test").split_hash
    assert main([
        "predict", "--run", str(tmp_path / "run"), "--data", "MTLCC", "--data.root", str(root),
        "--out", str(tmp_path / "maps"),
    ]) != 0  # fmt: skip
    assert "MTLCC, which is not cut into windows" in capsys.readouterr().err
