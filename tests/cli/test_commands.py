"""The commands as a user runs them, on small rasters written without the library."""

import json
import re
import shlex

import numpy as np
import pytest
import rasterio
import torch

from tests.conftest import REPOSITORY
from tests.data.writers import frames, write_rasters, write_tif
from timo.cli import main
from timo.tasks import ClassificationTask, SegmentationTask
from timo.tasks.pictures import class_colours
from timo.tasks.runs import save_model

SMALL = json.dumps(
    {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
)
DECODER = json.dumps(
    json.loads(SMALL) | {"decoder_embed_dim": 16, "decoder_num_heads": 2, "decoder_depth": 1}
)
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
NAMES = ["2001", "2003", "2004"]


@pytest.fixture
def series(tmp_path):
    """Three dates of 2 bands, 64 x 80; nodata 0 in a corner at all dates; a mask for each date."""
    pixels = frames(3, bands=2, height=64, width=80, dtype="uint8")
    pixels[..., :8, :8] = 0
    folder = tmp_path / "river"
    write_rasters(folder, NAMES, pixels, nodata=0)
    for name, frame in zip(NAMES, pixels):
        write_tif(folder / f"{name}_mask.tif", (frame[0] > 100).astype("uint8"))
    return folder


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def pretrain(series, out, *more):
    return run(
        "pretrain", "--out", out, "--data.train", "RasterSeries", "--data.train.root", series,
        "--data.train.tile", 64, "--data.train.stride", 16, "--data.batch_size", 2,
        "--task.model", "timo_tiny", "--task.model_options", DECODER, "--trainer.max_epochs", 2,
        *QUIET, *more,
    )  # fmt: skip


def finetune(series, out, *more):
    return run(
        "finetune", "--out", out, "--data.train", "RasterSeries", "--data.train.root", series,
        "--data.train.tile", 64, "--data.train.stride", 16, "--data.batch_size", 2,
        "--task.model", "timo_tiny", "--task.model_options", SMALL,
        "--task.classes", "[land, water]", "--trainer.max_steps", 2, *QUIET, *more,
    )  # fmt: skip


def test_the_whole_road(series, tmp_path, capsys):
    assert pretrain(series, tmp_path / "a") == 0
    for name in ("config.yaml", "environment.json", "task.json", "model.safetensors"):
        assert (tmp_path / "a" / name).is_file()
    assert (tmp_path / "a" / "checkpoints" / "last.ckpt").is_file()
    assert list((tmp_path / "a" / "logs").glob("events*"))
    assert "train/loss" in (tmp_path / "a" / "logs" / "metrics.csv").read_text()
    record = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert record["seed"] == 0 and record["packages"]["torch"]

    weights = tmp_path / "a" / "model.safetensors"
    validation = ("--data.val", "RasterSeries", "--data.val.root", series, "--data.val.tile", "64")
    assert finetune(series, tmp_path / "b", "--task.pretrained", weights, *validation) == 0
    said = capsys.readouterr().out
    assert "loaded" in said and "pretraining decoder" in said and "val/mean_iou" in said
    for name in "ab":
        assert json.loads((tmp_path / name / "task.json").read_text())["nodata"] == 0

    data = ("--data", "RasterSeries", "--data.root", series)
    assert run("evaluate", "--run", tmp_path / "b", *data, "--data.tile", 64,
               "--accelerator", "cpu", "--out", tmp_path / "scores.json") == 0  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"test/iou/land", "test/f1/water", "test/mean_iou", "test/accuracy"} <= set(scores)
    counts = np.array(scores["confusion"]["counts"])
    assert scores["confusion"]["classes"] == ["land", "water"] and counts.shape == (2, 2)
    assert counts.trace() / counts.sum() == pytest.approx(scores["test/accuracy"])
    assert counts[1, 1] / (counts[1].sum() + counts[:, 1].sum() - counts[1, 1]) == pytest.approx(
        scores["test/iou/water"]
    )
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")

    for name, encoder in (("c", "a"), ("d", "b")):
        assert run("embed", "--run", tmp_path / encoder, *data, "--data.tile", 64, "--per_frame",
                   "true", "--out", tmp_path / name) == 0  # fmt: skip
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "config.yaml", "environment.json", "embeddings.npz", "embeddings.png",
        }  # fmt: skip
        with np.load(tmp_path / name / "embeddings.npz") as table:
            assert table["embedding"].shape == (6, 16) and np.isfinite(table["embedding"]).all()
            assert table["window"].tolist() == [[0, 0]] * 3 + [[0, 16]] * 3

    fields = ("embed", "--run", tmp_path / "a", *data, "--maps", "true", "--out", tmp_path / "e")
    assert run(*fields, "--tile", 64, "--stage", 2, "--overlap", 16) == 0
    assert {path.name for path in (tmp_path / "e").iterdir()} == {
        "config.yaml", "environment.json", "river_embedding.tif", "river_embedding.png",
    }  # fmt: skip
    with rasterio.open(tmp_path / "e" / "river_embedding.tif") as file:
        known = np.isfinite(file.read())
    assert known.shape == (8, 8, 10) and known.sum() == 8 * 79 and not known[:, 0, 0].any()
    capsys.readouterr()
    for words, more in (
        ("per_frame is true; maps are of series", ("--per_frame", "true")),
        ("data.tile is 64; series are mapped whole", ("--data.tile", 64)),
        ("tile is 8, which is of maps; pass --maps true", ("--maps", "false", "--tile", 8)),
    ):
        assert run(*fields, *more) == 2
        assert words in capsys.readouterr().err

    assert run("predict", "--run", tmp_path / "b", *data, "--tile", 48, "--overlap", 16,
               "--out", tmp_path / "maps", "--change", "true",
               "--probabilities", "true") == 0  # fmt: skip
    with (
        rasterio.open(tmp_path / "maps" / "river.tif") as file,
        rasterio.open(series / "2001.tif") as source,
    ):
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, (64, 80))
        assert file.descriptions == ("2001-07-01", "2003-07-01", "2004-07-01")
        assert file.nodata == 255
        labels = file.read()
    assert (labels[:, :8, :8] == 255).all() and set(np.unique(labels[:, 8:])) <= {0, 1}
    with rasterio.open(tmp_path / "maps" / "river_probabilities.tif") as file:
        assert file.descriptions[:3] == ("2001-07-01 land", "2001-07-01 water", "2003-07-01 land")
        assert np.isnan(file.nodata) and file.dtypes[0] == "float32"
        shares = file.read().reshape(3, 2, 64, 80)
    assert (np.isnan(shares) == (labels == 255)[:, None]).all()
    known = labels != 255
    np.testing.assert_allclose(shares.sum(1)[known], 1, rtol=1e-5)
    assert (shares.argmax(1)[known] == labels[known]).all()
    with rasterio.open(tmp_path / "maps" / "river_change.tif") as file:
        change = file.read(1)
        assert file.descriptions == ("change 2001-07-01 to 2004-07-01",)
        assert file.colormap(1)[1][:3] == class_colours(2)[1] != file.colormap(1)[3][:3]
    valid = labels[0] != 255
    assert (change[valid] == labels[0][valid] * 2 + labels[2][valid]).all()
    assert (change[~valid] == 255).all()
    legend = json.loads((tmp_path / "maps" / "legend.json").read_text())
    assert legend["colours"] == {"0": "#dcd5c0", "1": "#1f77b4"}
    assert legend["change"]["1"] == "land to water" and legend["change_colours"]["1"] == "#1f77b4"
    for name in ("river.png", "river_change.png"):
        assert (tmp_path / "maps" / name).read_bytes().startswith(b"\x89PNG")

    later = ("predict", "--run", tmp_path / "b", *data, "--out", tmp_path / "later", "--change")
    assert run(*later, "[2004-07-01, 2003-07-01]") == 0
    with (
        rasterio.open(tmp_path / "later" / "river.tif") as file,
        rasterio.open(tmp_path / "later" / "river_change.tif") as changed,
    ):
        labels, change = file.read(), changed.read(1)
        assert changed.descriptions == ("change 2003-07-01 to 2004-07-01",)
    assert (change == labels[1] * 2 + labels[2])[(labels[1:] != 255).all(0)].all()
    capsys.readouterr()
    assert run(*later, "[2004-07-01, 2005-07-01]") == 2
    assert "two acquisition dates of series river, which has 2001-07-01" in capsys.readouterr().err


def test_resume_equals_an_uninterrupted_run(series, tmp_path):
    # Constant, for a schedule spans the whole run and the first part does not know its length.
    constant = ("--task.schedule", "constant", "--task.warmup", 0)
    assert pretrain(series, tmp_path / "whole", *constant) == 0
    assert pretrain(series, tmp_path / "parts", *constant, "--trainer.max_epochs", 1) == 0
    half = load(tmp_path / "parts")
    assert pretrain(series, tmp_path / "parts", *constant, "--resume", "true") == 0
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not all(torch.equal(half[key], parts[key]) for key in half)
    assert (tmp_path / "parts" / "logs" / "metrics.csv").is_file(), "the first part's log is gone"


def load(run):
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def test_a_run_repeats_from_its_configuration(series, tmp_path):
    assert pretrain(series, tmp_path / "a") == 0
    config = tmp_path / "a" / "config.yaml"
    assert run("pretrain", "--config", config, "--out", tmp_path / "b") == 0
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_input_is_one_message_and_leaves_results_alone(series, tmp_path, capsys):
    out = tmp_path / "a"
    assert pretrain(series, out) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def fails(code, words, command, *arguments):
        capsys.readouterr()
        assert command(*arguments) == code
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said

    fails(2, "is not empty", pretrain, series, out)
    fails(2, "start without --resume", pretrain, series, tmp_path / "new", "--resume", "true")
    fails(2, "is not a folder", pretrain, tmp_path / "nowhere", tmp_path / "new")
    fails(2, "task.classes", finetune, series, tmp_path / "new", "--task.classes", "null")
    fails(2, "does not fit", finetune, series, tmp_path / "new", "--task.pretrained",
          out / "model.safetensors", "--task.model_options", "{}")  # fmt: skip
    fails(2, "give the folder of a run", run, "predict", "--run", tmp_path, "--data",
          "RasterSeries", "--data.root", series, "--out", tmp_path / "maps")  # fmt: skip
    fails(2, "of a pretraining run", run, "predict", "--run", out, "--data", "RasterSeries",
          "--data.root", series, "--out", tmp_path / "maps")  # fmt: skip
    fails(2, "no command", run, "train")
    fails(2, "mask_rato", pretrain, series, tmp_path / "new", "--task.mask_rato", "0.5")
    config = tmp_path / "config.yaml"
    config.write_text("task:\n  learning_rat: 1.0\n")
    fails(2, "learning_rat", pretrain, series, tmp_path / "new", "--config", config)
    truncated = series / "2003.tif"
    truncated.write_bytes(truncated.read_bytes()[:200])
    fails(2, "2003.tif", pretrain, series, tmp_path / "new")
    assert not (tmp_path / "new").exists(), "a failed run left a folder behind"
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def left(classes=("land", "water"), kind=SegmentationTask, **options):
    """An untrained task of two bands, of dates unless `options` say otherwise."""
    return kind(
        ("band1", "band2"), [0.0, 0.0], [9.0, 9.0], [1.0, 1.0], [0.0, 0.0], classes,
        model="timo_tiny", model_options=json.loads(SMALL), **{"per_frame": True} | options,
    )  # fmt: skip


def test_change_is_asked_of_every_series_before_any_is_mapped(tmp_path, capsys):
    pixels = frames(3, bands=2, height=32, width=40, dtype="uint8")
    write_rasters(tmp_path / "data" / "a", ["2019", "2020"], pixels)
    write_rasters(tmp_path / "data" / "b", ["2019", "2021", "20220701T100000", "20220701T120000"],
                  [*pixels, pixels[0]])  # fmt: skip
    (tmp_path / "run").mkdir()
    save_model(left(), tmp_path / "run")
    data = ("--data", "RasterSeries", "--data.root", tmp_path / "data", "--accelerator", "cpu")
    command = ("predict", "--run", tmp_path / "run", *data, "--out", tmp_path / "maps")
    wrong = {
        "[2019-07-01, 2020-07-01]": "two acquisition dates of series b, which has 2019-07-01, 2021",
        "[2019-07-01, 2019-07-01]": "change is [2019-07-01, 2019-07-01]; it must be two acquis",
        "[2019-07-01]": "change is [2019-07-01]; it must be two acquisition dates of series a",
        "[]": "change is []; it must be two acquisition dates",
        "[soon, later]": "'soon' is none of",
        "2019-07-01": "change: expected true or false or expected a list, as [a, b], got 2019",
    }
    for change, words in wrong.items():
        assert run(*command, "--change", change) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said
    for name in ("a", "b"):
        chosen = (*command, "--data.samples", f"[{name}]", "--change")
        assert run(*chosen, "[2019, 2022-07-01]") == 2  # no such day, or two of them
        assert "a day that occurs twice names neither" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()
    assert run(*command, "--data.samples", "[b]", "--change", "[20210701, 20190701]") == 0
    with rasterio.open(tmp_path / "maps" / "b_change.tif") as file:
        assert file.descriptions == ("change 2019-07-01 to 2021-07-01",)
    save_model(left(per_frame=False), tmp_path / "run")
    capsys.readouterr()
    assert run(*command, "--change", "true") == 2
    assert "change needs a model with per_frame=True" in capsys.readouterr().err


def test_results_are_not_written_over_one_another_or_the_data(tmp_path, capsys):
    pixels = frames(2, bands=2, height=32, width=40, dtype="uint8")
    for name in ("x", "x_change"):
        write_rasters(tmp_path / "data" / name, ["2019", "2020"], pixels)
    (tmp_path / "run").mkdir()
    save_model(left(), tmp_path / "run")
    data = ("--data", "RasterSeries", "--data.root", tmp_path / "data", "--accelerator", "cpu")
    before = sorted(tmp_path.rglob("*"))
    for words, *more in (
        ("two results would be called x_change.tif", tmp_path / "maps", "--change", "true"),
        ("lies in the folder of the data", tmp_path / "data"),
        ("lies in the folder of the data", tmp_path / "data" / "maps"),
        ("tile is 0; it must be at least 1", tmp_path / "maps", "--tile", 0, "--overlap", 0),
    ):
        assert run("predict", "--run", tmp_path / "run", *data, "--out", *more) == 2
        assert words in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    beside = tmp_path / "data_maps"
    assert run("predict", "--run", tmp_path / "run", *data, "--out", beside) == 0
    assert {path.stem for path in beside.glob("*.tif")} == {"x", "x_change"}


def test_scores_of_a_single_class(tmp_path, capsys):
    pixels = frames(2, bands=2, height=32, width=32, dtype="uint8")
    write_rasters(tmp_path / "data" / "a", ["2019", "2020"], pixels)
    (tmp_path / "data" / "labels.csv").write_text("name,label\na,0\n")
    (tmp_path / "run").mkdir()
    save_model(left(["$all$"], ClassificationTask, per_frame=False), tmp_path / "run")
    out = tmp_path / "scores.v1"
    command = ("evaluate", "--run", tmp_path / "run", "--data", "RasterSeries", "--data.root",
               tmp_path / "data", "--accelerator", "cpu", "--out")  # fmt: skip
    assert run(*command, out) == 0
    assert json.loads(out.read_text())["confusion"] == {"classes": ["$all$"], "counts": [[1]]}
    assert (tmp_path / "scores.v1.png").is_file()
    capsys.readouterr()
    for wrong in (tmp_path / "data", tmp_path / "x.png", tmp_path / "nowhere" / "x.json"):
        assert run(*command, wrong) == 2
        assert f"out is {wrong}" in capsys.readouterr().err


def test_scores_of_what_is_labelled(tmp_path, capsys):
    """A class that does not occur has no score; labels that fit no class are refused."""
    pixels = frames(3, bands=2, height=32, width=32, dtype="uint8")
    for name in ("a", "b"):
        write_rasters(tmp_path / "data" / name, NAMES, pixels)
        write_tif(tmp_path / "data" / name / "mask.tif", np.zeros((32, 32), "uint8"))
    data = tmp_path / "data"
    task = left(("land", "water", "ice"), per_frame=False)
    torch.nn.init.constant_(task.model.classifier.bias[0], 99)  # always land
    (tmp_path / "run").mkdir()
    save_model(task, tmp_path / "run")
    scores = tmp_path / "scores.json"

    def evaluate(code, words):
        capsys.readouterr()
        assert run("evaluate", "--run", tmp_path / "run", "--data", "RasterSeries", "--data.root",
                   data, "--accelerator", "cpu", "--out", scores) == code  # fmt: skip
        said = capsys.readouterr()
        assert words in (said.out if code == 0 else said.err) and "Traceback" not in said.err, said

    evaluate(0, "nan")
    found = json.loads(scores.read_text(), parse_constant=pytest.fail)
    assert [found[f"test/iou/{name}"] for name in ("land", "water", "ice")] == [1, None, None]
    assert found["test/mean_iou"] == 1

    mask = data / "b" / "mask.tif"
    write_tif(mask, np.full((32, 32), 7, "uint8"))
    evaluate(2, "series b: has the label 7, but the classes are 0 ... 2, land, water, ice")
    mask.unlink()
    evaluate(2, "samples 'a' and 'b': must hold the same")
    for name in ("a", "b"):
        write_tif(data / name / "mask.tif", np.full((32, 32), 255, "uint8"))
    evaluate(2, "nothing to measure")
    for name in ("a", "b"):
        (data / name / "mask.tif").unlink()
    evaluate(2, "series a, b: has no mask, which a segmentation run needs")


@pytest.mark.parametrize("words, told", [
    (["pretrain", "--data.train", "RasterSeries", "--data.train.root", "nowhere"],
     ["nowhere: is not a folder; it must hold rasters"]),
    (["data", "check", "--data.root", "x"], ["is abstract", "as --data RasterSeries"]),
    (["predict", "--run", "x", "--out", "y", "--data", "RasterSerie"],
     ["RasterSerie\n", "as --data RasterSeries: one of RasterSeries, NumpySeries"]),
    (["predict", "--run", "x", "--out", "y", "--data", "RasterSeries", "--data.tiles", "3"],
     ["Option 'tiles' is not accepted (perhaps tile)\nsee --data.help RasterSeries"]),
    (["finetune", "--trainer.max_step", "3"],
     ["unrecognized arguments: --trainer.max_step 3\n",
      "--trainer.max_step: perhaps --trainer.max_steps\nsee --help, and --data.help"]),
    (["finetune", "--epochs=3"], ["perhaps --trainer.max_epochs or --trainer.min_epochs\n"]),
    (["pretrain", "--mask", "0.5"], ["--mask: perhaps --task.mask_ratio\n"]),
    (["finetune", "--zebra=3"], ["unrecognized arguments: --zebra=3\nsee --help"]),
    (["finetune", "--task.learning_rate", "abc"],
     ["task.learning_rate: expected a number, got abc"]),
])  # fmt: skip
def test_messages_of_the_parser_are_readable(words, told, capsys):
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in told), said
    assert not any(noise in said for noise in ("Union", "NoneType", "Namespace", "Given value"))


def test_unknown_keys_of_a_file_are_answered_with_like_ones(tmp_path, capsys):
    answers = {
        "trainer: {max_epoch: 3}": "'max_epoch' (perhaps trainer.max_epochs)",
        "batch_size: 3": "'batch_size' is not accepted (perhaps data.batch_size)",
    }
    for text, told in answers.items():
        (tmp_path / "config.yaml").write_text(text)
        assert run("finetune", "--config", tmp_path / "config.yaml") == 2
        assert told in capsys.readouterr().err


def test_usage_of_the_data_commands(capsys):
    assert run("data", "--help") == 0
    said = capsys.readouterr().out
    assert "timo data check" in said and "timo pretrain" not in said
    assert run("data") == 2


def test_predict_refuses_what_it_cannot_map(series, tmp_path, capsys):
    def refused(words, *data):
        assert run("predict", "--run", tmp_path, "--out", tmp_path / "maps", "--data", *data) == 2
        assert words in capsys.readouterr().err

    rasters = ("RasterSeries", "--data.root", series)
    refused("data.region is [0.5, 0.0, 1.0, 1.0]; series are mapped whole", *rasters,
            "--data.region", "[0.5, 0.0, 1.0, 1.0]")  # fmt: skip
    refused("data.min_valid is 0.5; series are mapped whole", *rasters, "--data.min_valid", 0.5)
    for name in ("StoreSeries", "PublishedCorpus"):
        refused(f"{name}, which is not cut into windows", name, "--data.path", tmp_path)
    refused("SimulatedSeries, which is not cut into windows", "SimulatedSeries")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(series, tmp_path, capsys):
    assert pretrain(series, tmp_path / "new", "--trainer.accelerator", "gpu") == 2
    said = capsys.readouterr().err
    assert "No supported gpu backend" in said and "Traceback" not in said


def test_all_invalid_series_are_refused_by_name(tmp_path, capsys):
    pixels = np.zeros((2, 1, 64, 64), "uint8")
    write_rasters(tmp_path / "dark", ["2001", "2002"], pixels, nodata=0)
    assert pretrain(tmp_path / "dark", tmp_path / "out") == 2
    assert "valid pixel" in capsys.readouterr().err


def test_simulate_and_check(tmp_path, capsys):
    out = tmp_path / "simulated"
    assert run("data", "simulate", "--out", out, "--count", 2, "--series.dates", 3,
               "--series.size", 32) == 0  # fmt: skip
    page = tmp_path / "page.html"
    data = ("--data", "NumpySeries", "--data.path", out)
    assert run("data", "check", *data, "--out", page) == 0
    assert "data:image/png" in page.read_text()
    assert run("data", "simulate", "--out", out) == 2
    assert "empty" in capsys.readouterr().err


def test_info(capsys):
    assert run("info") == 0
    said = capsys.readouterr().out
    assert "temporal_median" in said and "torch" in said
    taken = said.split("`auto` takes")[1]
    assert "gyroscope_attention            triton  sm_90" in taken and "atomic" not in taken
    assert run() == 2 and run("--help") == 0


def documented(path) -> list[list[str]]:
    """The words of every timo command that a file shows."""
    text = path.read_text().replace("\\\n#", " ").replace("\\\n", " ")
    lines = re.findall(
        r"^(?:# )?timo ((?:data |pretrain |finetune |evaluate |predict |embed ).*)", text, re.M
    )
    return [shlex.split(line, comments=True) for line in lines]


# What makes a documented command quick, and nothing else.
QUICK = {
    "pretrain": ["--data.train.tile", "32", "--task.model", "timo_tiny",
                 "--task.model_options", DECODER, "--trainer.max_steps", "1", *QUIET],
    "finetune": ["--data.train.tile", "32", "--data.val.tile", "32", "--task.model", "timo_tiny",
                 "--task.model_options", SMALL, "--trainer.max_steps", "1", *QUIET],
    "evaluate": ["--accelerator", "cpu"], "predict": ["--accelerator", "cpu"],
    "embed": ["--accelerator", "cpu", "--data.tile", "32"], "data": [],
}  # fmt: skip


def test_documented_commands_run(tmp_path, monkeypatch, capsys):
    """Those of README.md, and those that the configurations name, on rasters as they ask for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    pixels = frames(3, bands=2, height=40, width=48, dtype="uint8")
    write_rasters(tmp_path / "series", ["20200114", "20200301_L8", "2020-04-02"], pixels)
    write_tif(tmp_path / "series" / "mask.tif", (pixels[0, 0] > 100).astype("uint8"))
    shown = [documented(REPOSITORY / "README.md")] + [
        documented(REPOSITORY / "configs" / f"{name}_rasters.yaml")
        for name in ("pretrain", "finetune")
    ]
    road = "data pretrain finetune evaluate predict embed"
    assert " ".join(words[0] for words in shown[0]) == road
    assert [words[0] for (words,) in shown[1:]] == ["pretrain", "finetune"]
    for number, commands in enumerate(shown):
        for words in commands:
            extra = ["--data.workers", "0"] if words[0] in ("pretrain", "finetune") else []
            extra += ["--out", f"runs/{number}"] if number else []
            assert run(*words, *QUICK[words[0]], *extra) == 0, (words, capsys.readouterr().err)
        if number == 0:
            (tmp_path / "series").rename(tmp_path / "FOLDER")
    assert (tmp_path / "check.html").is_file() and (tmp_path / "maps" / "series.tif").is_file()
    assert (tmp_path / "vectors" / "embeddings.npz").is_file()


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_understood(path):
    from timo.cli.parsing import training_parser
    from timo.tasks import PretrainingTask, SegmentationTask

    finetune = path.stem.startswith("finetune")
    task, derived = (SegmentationTask, {"per_frame"}) if finetune else (PretrainingTask, set())
    options = training_parser("timo x", "", task, derived).parse_args(["--config", str(path)])
    assert options.task.model.startswith("timo_") and options.data.train is not None
