"""Parsers of the commands that read data: YAML and command line alike."""

import difflib
import re
import warnings
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer

import timo.data
from timo.tasks import SeriesData

# Data sets may be named by their class alone, as `--data.train RasterSeries`.
DATASETS: tuple[type, ...] = (
    timo.data.RasterSeries,
    timo.data.NumpySeries,
    timo.data.SimulatedSeries,
    timo.data.StoreSeries,
    timo.data.PublishedCorpus,
    *timo.data.READERS.values(),
)
# What the run's folder decides by itself.
OURS = {"logger", "callbacks", "default_root_dir", "enable_checkpointing", "enable_progress_bar"}
FROM_DATA = {"bands", "mean", "deviation", "scale", "offset"}


class OptionParser(ArgumentParser):
    """A parser that names the options which an unknown one is like."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        words = message.partition("unrecognized arguments: ")[2].split()
        if "perhaps" not in message:  # errors come here again
            for option in dict.fromkeys(word.partition("=")[0] for word in words):
                if option.startswith("--") and (near := alike(option, known)):
                    message += f"\n{option}: perhaps {' or '.join(near)}"
        of_file = (
            r"(?:Group '[\w.]+' does not accept option|Option) '([\w.]+)'(?: is not accepted)?"
        )
        if key := re.fullmatch(of_file, message):
            if near := alike(key[1], [option[2:] for option in known]):
                message += f" (perhaps {' or '.join(near)})"
        super().error(message, ex)


def alike(name: str, known: Sequence[str]) -> list[str]:
    """At most two of the dotted names `known` that `name` may stand for, shortest first.

    Those whose last part has that of `name` in it (`--epochs`: `--trainer.max_epochs`), else those
    that are spelled nearly so. Groups of options and requests for help are none.
    """
    last = {
        option: option.lstrip("-").rpartition(".")[2]
        for option in sorted(known, key=len)
        if not option.endswith("help") and not any(o.startswith(option + ".") for o in known)
    }
    word = name.lstrip("-").rpartition(".")[2]
    within = [option for option, part in last.items() if f"_{word}_" in f"_{part}_"]
    spelled = difflib.get_close_matches(word, last.values(), 1, 0.75)
    return (within or [option for option in last if last[option] in spelled])[:2]


def series_parser(program: str, description: str | None) -> ArgumentParser:
    """A parser with `--config`, whose errors name the key and are raised."""
    parser = OptionParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of these options")
    return parser


def training_parser(
    program: str, description: str | None, task: type, derived: set
) -> ArgumentParser:
    """Options of a training run: out, seed, resume, data.*, task.*, trainer.*."""
    parser = series_parser(program, description)
    name = program.split()[-1]
    parser.add_argument("--out", type=str, default=f"runs/{name}", help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="of weights, shuffling and masking")
    parser.add_argument("--resume", type=bool, default=False, help="go on from the last checkpoint")
    parser.add_class_arguments(SeriesData, "data", skip={"test"})
    parser.link_arguments("seed", "data.seed")
    parser.add_class_arguments(task, "task", skip=FROM_DATA | derived, instantiate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's deprecated options
        parser.add_class_arguments(Trainer, "trainer", skip=OURS, instantiate=False)
    parser.set_defaults({"trainer.log_every_n_steps": 1})
    return parser


def parse_training(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Options of a training run, which lasts 100 epochs where nothing else ends it."""
    options = parser.parse_args(arguments)
    trainer = options.trainer
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        trainer.max_epochs = 100
    return options
