"""The folder of a run: started, stopped, resumed, and what it holds at the end."""

import csv
import json
import math
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tasks.test_tasks import SMALL, segmentation
from timo import create_model, load_checkpoint, save_checkpoint
from timo.data import DataError, SimulatedSeries
from timo.tasks import SegmentationTask, SeriesData, load_task
from timo.tasks.runs import fit

QUIET = {
    "accelerator": "cpu", "enable_model_summary": False, "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}  # fmt: skip


class Scenes(SimulatedSeries):
    """Two small series of two bands."""

    def __init__(self, seed: int = 0):
        super().__init__(2, bands=("B03", "B04"), size=32, dates=2, target="land_cover", seed=seed)


def data(watched: bool = False) -> SeriesData:
    return SeriesData(Scenes(), val=Scenes(seed=1) if watched else None, batch_size=2)


def task(**options) -> SegmentationTask:
    torch.manual_seed(0)
    task = segmentation(**{"classes": Scenes().classes, "learning_rate": 1e-3} | options)
    task.bands = ("B03", "B04")
    return task


def content(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def interrupted():
    """A task that Ctrl-C stops at its first step; Lightning then ignores the signal."""
    stopped, handler = task(), signal.getsignal(signal.SIGINT)

    def training_step(*_):
        raise KeyboardInterrupt

    stopped.training_step = training_step
    yield stopped
    signal.signal(signal.SIGINT, handler)


def test_a_run_without_a_checkpoint_is_replaced(tmp_path, interrupted):
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, data(), tmp_path, config="first", max_epochs=1, **QUIET)
    assert (tmp_path / "config.yaml").read_text() == "first"
    with pytest.raises(ValueError, match="resume: .*last.ckpt does not exist; start without"):
        fit(task(), data(), tmp_path, resume=True, **QUIET)
    (tmp_path / "logs" / "stale").touch()
    note = tmp_path / "note.txt"
    note.touch()
    with pytest.raises(ValueError, match=f"out: {tmp_path} is not empty; name another folder$"):
        fit(task(), data(), tmp_path, **QUIET)
    note.unlink()
    fit(task(), data(), tmp_path, config="second", max_epochs=1, **QUIET)
    names = {
        "config.yaml", "environment.json", "splits.json", "task.json", "model.safetensors",
        "logs", "checkpoints",
    }  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (tmp_path / "config.yaml").read_text() == "second"
    assert not (tmp_path / "logs" / "stale").exists()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="not empty; name another folder, or pass --resume true"):
        fit(task(), data(), tmp_path, **QUIET)
    assert content(tmp_path) == before


def test_a_resumed_run_leaves_the_record_of_the_first(tmp_path):
    fit(task(), data(), tmp_path, config="first", max_epochs=1, **QUIET)
    before = content(tmp_path)
    wider = SMALL | {"embed_dims": [16, 16, 16, 16]}
    weighted = [1.0] * len(Scenes().classes)
    others = {"model.": task(model_options=wider), "class_weights": task(class_weights=weighted)}
    for first, other in others.items():
        with pytest.raises(ValueError, match=f"of another model, by {first}.*task.* options of"):
            fit(other, data(), tmp_path, True, config="wrong", max_epochs=2, **QUIET)
        assert content(tmp_path) == before
    for number in (2, 3):
        fit(task(), data(), tmp_path, True, config=f"run {number}", max_epochs=number, **QUIET)
        assert (tmp_path / f"config_{number}.yaml").read_text() == f"run {number}"
        assert json.loads((tmp_path / f"environment_{number}.json").read_text())["seed"] == 0
        assert (tmp_path / f"splits_{number}.json").is_file()
        assert "train/loss" in (tmp_path / f"logs_{number}" / "metrics.csv").read_text()
    after = content(tmp_path)
    records = "config.yaml", "environment.json", "splits.json", "logs/metrics.csv"
    assert all(after[Path(name)] == before[Path(name)] for name in records)


@pytest.mark.parametrize("epochs, watched_every", [(3, 2), (1, 5)])
def test_the_last_checkpoint_is_of_the_last_epoch(tmp_path, epochs, watched_every):
    options = {"max_epochs": epochs, "check_val_every_n_epoch": watched_every}
    fit(task(), data(watched=True), tmp_path, **options, **QUIET)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == epochs - 1
    assert (tmp_path / "best.safetensors").is_file() == (watched_every <= epochs)


def test_the_best_weights_are_kept_for_use(tmp_path):
    trained = task()
    fit(trained, data(watched=True), tmp_path, max_epochs=3, check_val_every_n_epoch=2, **QUIET)
    state = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    best, last = (load_file(tmp_path / f"{n}.safetensors") for n in ("best", "model"))
    assert all(torch.equal(x, state[f"model.{name}"]) for name, x in best.items())
    assert any(not torch.equal(x, last[name]) for name, x in best.items())
    held = trained.model.state_dict()
    assert all(torch.equal(x, held[name]) for name, x in last.items())

    for path, expected in (("best", best), ("last", last)):
        report = load_checkpoint(trained.model, tmp_path / "checkpoints" / f"{path}.ckpt")
        assert report.mapped.keys() == expected.keys() and not report.left_out
        assert all(torch.equal(x, expected[k]) for k, x in trained.model.state_dict().items())
    for chosen, expected in ((True, best), (False, last)):
        read = load_task(tmp_path, Scenes(), best=chosen).model.state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in read.items())
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(DataError, match="best.safetensors: does not exist.* omit --best"):
        load_task(tmp_path, Scenes(), best=True)


def test_a_stopped_run_is_of_use(tmp_path, interrupted):
    with pytest.raises(DataError, match="task.json: does not exist; give the folder of a run"):
        load_task(tmp_path, Scenes())
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, data(), tmp_path, max_epochs=1, **QUIET)
    with pytest.raises(DataError, match="last.ckpt: does not exist, for the run has done no epoch"):
        load_task(tmp_path, Scenes())

    def stop_in_third_epoch(trained):
        step = trained.training_step

        def training_step(*arguments):
            if trained.current_epoch == 2:
                raise KeyboardInterrupt
            return step(*arguments)

        trained.training_step = training_step
        return trained

    options = {"check_val_every_n_epoch": 2, **QUIET}
    once = tmp_path / "once"
    fit(task(), data(watched=True), once, max_epochs=1, **options)
    weights = (once / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match="best.safetensors: does not exist, for nothing was vali"):
        load_task(once, Scenes(), best=True)
    described = json.loads((once / "task.json").read_text())
    with pytest.raises(KeyboardInterrupt):  # what the first run left is not what it knows now
        stopped = stop_in_third_epoch(task())
        fit(stopped, data(watched=True), once, resume=True, max_epochs=5, **options)
    assert (once / "model.safetensors").read_bytes() == weights
    assert json.loads((once / "task.json").read_text()) == described | {"ended": False}
    for name, best in (("last", False), ("best", True)):
        state = torch.load(once / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert state["epoch"] == 1
        with pytest.warns(UserWarning, match=f"{name}.ckpt: weights of a run that has not ended"):
            read = load_task(once, Scenes(), best).model.state_dict()
        assert all(torch.equal(x, state["state_dict"][f"model.{k}"]) for k, x in read.items())
    (once / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(DataError, match="best.ckpt: does not exist, for nothing was validated"):
        load_task(once, Scenes(), best=True)

    fit(task(), data(), once, resume=True, max_epochs=3, **options)
    assert json.loads((once / "task.json").read_text()) == described
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(once, Scenes())


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_frozen_weights_stay_as_they_are(tmp_path, head):
    options = SMALL | {"head": head, "drop_path_rate": 0.5}
    torch.manual_seed(1)
    weights, before = tmp_path / "mae.safetensors", create_model("timo_tiny", "mae", 2, **SMALL)
    save_checkpoint(before, weights)
    probe = task(model_options=options, pretrained=str(weights), freeze=True)
    start = {name: x.clone() for name, x in probe.model.state_dict().items()}
    given = set(probe.pretrained_report.mapped.values())
    fit(probe, data(watched=True), tmp_path / "run", max_epochs=2, **QUIET)
    for name, x in probe.model.state_dict().items():
        assert torch.equal(x, start[name]) == (name in given), name
    assert given < set(start) and "encoder.stage1.embed.bn.running_mean" in given
    assert {name for name in start if "encoder" in name} - given == {
        name for name in start if ".gate" in name
    }  # fmt: skip
    probe.train()
    for name, module in probe.model.named_modules():
        kept = any(f"{name}.{own}" in given for own in module.state_dict() if "." not in own)
        assert module.training != (kept or name.endswith("drop_path")), name


def test_a_run_is_resumed_with_what_it_trains(tmp_path):
    save_checkpoint(task().model, tmp_path / "model.safetensors")
    options = {"pretrained": str(tmp_path / "model.safetensors"), "fresh": ["classifier"]}
    out = tmp_path / "run"
    fit(task(freeze=True, **options), data(), out, max_epochs=1, **QUIET)
    before = content(out)
    with pytest.raises(ValueError, match="trains 2 weights, this one trains .*task.freeze and"):
        fit(task(**options), data(), out, resume=True, max_epochs=2, **QUIET)
    assert content(out) == before
    fit(task(freeze=True, **options), data(), out, resume=True, max_epochs=2, **QUIET)


def test_a_run_of_no_steps_leaves_its_first_weights(tmp_path):
    fresh = task(schedule="cosine", warmup=0.0)
    start = {name: x.clone() for name, x in fresh.model.state_dict().items()}
    fit(fresh, data(), tmp_path / "run", max_steps=0, **QUIET)
    held = load_file(tmp_path / "run" / "model.safetensors")
    assert held.keys() == start.keys() and all(torch.equal(held[k], start[k]) for k in held)


def test_freezing_needs_something_to_keep_and_something_to_train(tmp_path):
    save_checkpoint(task().model, tmp_path / "model.safetensors")
    weights = str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="freeze is true without pretrained"):
        task(freeze=True)
    with pytest.raises(ValueError, match="nothing is left to train.*fresh"):
        task(pretrained=weights, freeze=True)
    probe = task(pretrained=weights, freeze=True, fresh=["classifier"])
    trained = [name for name, x in probe.model.named_parameters() if x.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("limit", [{}, {"max_steps": 100}, {"max_steps": 5}])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, limit, watched):
    class Six(Scenes):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return super().__getitem__(index % 2)

    def run(out, epochs, resume=False, steps=limit):
        fit(task(), SeriesData(Six(), val=Six(1) if watched else None, batch_size=2), out, resume,
            max_epochs=epochs, **steps, **QUIET)  # fmt: skip
        last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
        return load_file(out / "model.safetensors"), (last["epoch"], last["global_step"])

    def steps_of(*logs):
        with_loss = [row for log in logs for row in csv.DictReader(log.open()) if row["train/loss"]]
        return [(row["epoch"], row["step"], row["train/loss"]) for row in with_loss]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    weights, reached = run(whole, 3)
    assert reached == ((2, 9) if limit != {"max_steps": 5} else (1, 5))
    run(parts, 1, steps={})
    found, done = run(parts, 3, resume=True)
    assert done == reached and all(torch.equal(x, found[name]) for name, x in weights.items())
    logs = steps_of(parts / "logs" / "metrics.csv", parts / "logs_2" / "metrics.csv")
    assert logs == steps_of(whole / "logs" / "metrics.csv")


def test_a_run_that_goes_on_past_its_end_goes_on_learning(tmp_path):
    fit(task(schedule="cosine"), data(), tmp_path, max_steps=2, **QUIET)
    fit(task(schedule="cosine"), data(), tmp_path, True, max_steps=4, **QUIET)
    with open(tmp_path / "logs_2" / "metrics.csv") as file:
        rates = [float(row["lr-AdamW/pg1"]) for row in csv.DictReader(file) if row["lr-AdamW/pg1"]]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * s / 4)) / 2 for s in (2, 3)])


def test_what_a_resumed_run_must_keep(tmp_path):
    fit(task(), data(), tmp_path, max_epochs=2, **QUIET)
    before = content(tmp_path)
    other = task(classes=tuple(reversed(Scenes().classes)))
    with pytest.raises(ValueError, match="is a run of classes .*, not .*, or start another"):
        fit(other, data(), tmp_path, True, max_epochs=3, **QUIET)
    for limit in ({"max_epochs": 2}, {"max_epochs": 5, "max_steps": 1}):
        with pytest.raises(ValueError, match=r"has ended after 2 epochs, 2 steps, .* is \d; raise"):
            fit(task(), data(), tmp_path, True, **limit, **QUIET)
    assert content(tmp_path) == before
    described = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps(described | {"ended": False}))
    (tmp_path / "model.safetensors").unlink()  # as if killed after the last checkpoint
    fit(task(), data(), tmp_path, True, max_epochs=2, **QUIET)
    assert json.loads((tmp_path / "task.json").read_text()) == described
    assert (tmp_path / "model.safetensors").is_file()


def test_a_run_without_an_end_has_a_constant_rate(tmp_path):
    def endless(**options):
        endless = task(**options)
        endless.on_train_epoch_end = lambda: setattr(endless.trainer, "should_stop", True)
        return fit(endless, data(), tmp_path, max_epochs=-1, max_time="01:00:00:00", **QUIET)

    for options in ({"schedule": "cosine"}, {"warmup": 0.1}):
        with pytest.raises(ValueError, match="neither max_epochs nor max_steps .* constant"):
            endless(**options)
    assert endless().optimizers[0].param_groups[0]["lr"] == 1e-3
