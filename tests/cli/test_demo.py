"""`timo demo` from end to end on a small scene, and where it looks for the real series."""

import json

import numpy as np
import pytest
import rasterio

from timo.cli import demo, main, simulated_scene


def test_the_demonstration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulated_scene, "SHAPE", (64, 192))
    monkeypatch.setattr(demo, "TILE", 64)
    monkeypatch.delenv("TIMO_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--pretrain_steps", "1", "--finetune_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "simulated river landscape" in said and "from scratch" in said
    out = tmp_path / "runs" / "demo"
    figures = json.loads((out / "figures.json").read_text())
    assert figures["steps"] == {"pretraining": 1, "fine-tuning": 1}
    for scores in figures["east"].values():
        assert {"test/iou/water", "test/f1/water", "test/accuracy"} <= scores.keys()
    with rasterio.open(out / "water.tif") as file:
        labels = file.read()
    assert labels.shape == (8, 64, 192) and set(np.unique(labels)) <= {0, 1, 255}
    with rasterio.open(out / "change.tif") as file:
        change, valid = file.read(1), (labels[0] != 255) & (labels[-1] != 255)
    assert (change == np.where(valid, 2 * labels[0] + labels[-1], 255)).all()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "Agreement with the index" in page
    for name, score in figures["east"].items():
        assert f"<td>{name}</td>" in page and f"{score['test/accuracy']:.4f}" in page


def test_where_the_real_series_lies(tmp_path):
    series = tmp_path / "pucallpa_landsat"
    series.mkdir()
    for given in (tmp_path, series):
        folder, source = demo._find_series(str(given), tmp_path)
        assert folder.samefile(series) and "real" in source
    with pytest.raises(ValueError, match=r"data: \S+/other neither is nor holds a folder puc"):
        demo._find_series(str(tmp_path / "other"), tmp_path)
