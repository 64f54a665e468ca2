"""Commands of training: several processes, how long a run lasts, and what repeats it."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from tests.cli.test_commands import DECODER, QUIET, SMALL, pretrain, run, series  # noqa: F401
from tests.conftest import REPOSITORY
from timo.cli.parsing import parse_training, training_parser
from timo.data import SimulatedSeries
from timo.tasks import ClassificationTask, PretrainingTask, SegmentationTask, load_task


@pytest.mark.slow
def test_two_processes_train_into_one_folder(series, tmp_path):  # noqa: F811
    """Each runs the command, the first alone writes and reports."""
    out = tmp_path / "out"
    command = [
        "pretrain", "--out", out, "--data.train", "RasterSeries", "--data.train.root", series,
        "--data.train.tile", 64, "--data.train.stride", 16, "--data.batch_size", 1,
        "--task.model", "timo_tiny", "--task.model_options", DECODER, "--trainer.max_steps", 1,
        "--trainer.accelerator", "cpu", "--trainer.devices", 2,
    ]  # fmt: skip
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    done = subprocess.run(
        [sys.executable, "-m", "timo.cli", *map(str, command)],
        capture_output=True, text=True, cwd=REPOSITORY, env=alone | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model, configuration and logs are in") == 1
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "environment.json", "splits.json", "logs", "checkpoints",
        "model.safetensors", "task.json",
    }  # fmt: skip


@pytest.mark.parametrize("given, epochs", [
    ([], 100),
    (["--trainer.max_epochs", "7"], 7),
    (["--trainer.max_steps", "150"], None),
    (["--trainer.max_steps", "150", "--trainer.max_epochs", "7"], 7),
    (["--trainer.max_time", "00:01:00:00"], None),
])  # fmt: skip
def test_epochs_are_limited_by_default_only_where_nothing_else_ends_a_run(given, epochs):
    parser = training_parser("timo pretrain", "", PretrainingTask, set())
    assert parse_training(parser, given).trainer.max_epochs == epochs


def test_the_configuration_of_a_resumed_run_repeats_it(series, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    assert pretrain(series, out, "--trainer.max_epochs", 1) == 0
    assert pretrain(series, out, "--resume", "true") == 0
    parser = training_parser("timo pretrain", "", PretrainingTask, set())
    for name, epochs in (("config", 1), ("config_2", 2)):
        again = parse_training(parser, ["--config", str(out / f"{name}.yaml")])
        assert again.trainer.max_epochs == epochs and not again.resume


class Labelled(SimulatedSeries):
    """Four small series, each with one label."""

    def __init__(self):
        super().__init__(4, bands=("B03", "B04"), size=32, dates=2, target=None)

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(index) | {"label": torch.tensor(index % 2)}


def test_the_printed_configuration_of_a_classification_runs(tmp_path, capsys):
    out, printed = tmp_path / "out", tmp_path / "printed.yaml"
    given = [
        "finetune", "--out", out, "--data.train", "tests.cli.test_training.Labelled",
        "--task.classes", "[even, odd]", "--task.model", "timo_tiny", "--task.model_options", SMALL,
        "--task.scores", "weighted", "--task.weight_decay", 0.1, "--trainer.max_steps", 1, *QUIET,
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        run(*given, "--print_config")
    printed.write_text(capsys.readouterr().out)
    assert run("finetune", "--config", printed) == 0
    used = yaml.safe_load((out / "config.yaml").read_text())["task"]
    assert used["weight_decay"] == 0.1 and used["scores"] == "weighted"
    for name in ("learning_rate", "warmup", "schedule"):
        assert used[name] == ClassificationTask.recipe[name] != SegmentationTask.recipe[name]
    task = load_task(out, Labelled())
    assert isinstance(task, ClassificationTask) and "test/weighted_f1" in task.test_metrics.keys()
