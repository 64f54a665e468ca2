"""Choose the command, and turn bad input into one line on stderr."""

import importlib
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence

from timo.cli.memory import keep_freed_memory

COMMANDS = {
    "pretrain": ("timo.cli.training", "pretrain", "pretrain on unlabelled series"),
    "finetune": ("timo.cli.training", "finetune", "fine-tune for segmentation or classification"),
    "evaluate": ("timo.cli.inference", "evaluate", "measure a fine-tuned model on labelled series"),
    "predict": ("timo.cli.inference", "predict", "map whole rasters to GeoTIFF, or list classes"),
    "embed": ("timo.cli.inference", "embed", "a vector for every series or date, with a picture"),
    "data simulate": ("timo.cli.data", "simulate", "write simulated series with truth"),
    "data build-pretraining": ("timo.cli.build", "build_pretraining", "store for pretraining"),
    "data check": ("timo.cli.data", "check", "look at a data set: gaps, units, labels; HTML page"),
    "info": ("timo.cli.info", "info", "installation, devices, and which backend runs each op"),
    "bench": ("timo.cli.bench", "bench", "time ops and their alternatives on this machine"),
    "demo": ("timo.cli.demo", "demo", "the whole road on a real series, with a report"),
}

COMPUTING = {"pretrain", "finetune", "evaluate", "predict", "embed", "demo"}


def usage(group: str = "") -> str:
    """What the commands do; those whose name begins with `group`."""
    chosen = {name: help for name, (_, _, help) in COMMANDS.items() if name.startswith(group)}
    lines = [f"  timo {name:22s} {help}" for name, help in chosen.items()]
    return "\n".join(["usage: timo COMMAND [--help] [options]", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 found wanting, 2 bad input, 130 stopped.

    Bad input is reported in one message; TIMO_TRACEBACK=1 shows where it was noticed. Without
    `arguments`, those of the process are taken, which is the command's own and keeps freed memory.
    """
    own_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    words = 2 if arguments[0] == "data" else 1
    if words == 2 and arguments[1:2] in ([], ["-h"], ["--help"]):
        print(usage("data "))
        return 0 if arguments[1:] else 2
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        print(f"timo: {name!r} is no command\n{usage()}", file=sys.stderr)
        return 2
    if own_process and name in COMPUTING:
        keep_freed_memory()
    module, function, _ = COMMANDS[name]
    # Lightning advertises services and warns of its own internals; errors still come through.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    formatted = warnings.formatwarning
    if os.environ.get("TIMO_TRACEBACK") != "1":
        warnings.formatwarning = lambda message, *_, **__: f"timo {name}: {message}\n"
    try:
        command = getattr(importlib.import_module(module), function)
        return command(arguments[words:]) or 0
    except KeyboardInterrupt as remedy:
        _close_bars()
        print(": ".join([f"timo {name}", "stopped", *map(str, remedy.args)]), file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if os.environ.get("TIMO_TRACEBACK") == "1":
            raise
        print(
            f"timo {name}: {error.name} is not installed: pip install 'timo[train,geo]'",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if os.environ.get("TIMO_TRACEBACK") == "1" or not _of_input(error):
            raise
        _close_bars()
        print(f"timo {name}: {plain(str(error))}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = formatted


def _close_bars() -> None:
    """End the progress bars of Lightning, so that a message has a line of its own."""
    if module := sys.modules.get("tqdm.std"):
        for bar in [*getattr(module.tqdm, "_instances", ())]:
            bar.close()


KINDS = {
    "bool": "true or false", "list": "a list, as [a, b]", "int": "a whole number",
    "float": "a number", "str": "text",
}  # fmt: skip


def plain(message: str) -> str:
    """A message without what the parser of options says about types and its own objects."""
    key = re.search(r'Parser key "([\w.]+)":', message)
    if "Union subtypes" in message:
        listed = message.partition("Errors:\n")[2].partition("Given value type:")[0]
        reasons = [reason.strip() for reason in re.split(r"^ *- ", listed, flags=re.M)]
        told = [text for text in reasons if text and "Expected a <class 'NoneType'>" not in text]
        if told:
            given = re.search(r"Given value: ((?!Namespace|NestedArg).{1,80})$", message)
            message = f"{key[1]}: " if key else ""
            joint = " or " if all(text.startswith("Expected a <") for text in told) else "\n"
            message += joint.join(told) + (f", got {given[1]}" if given else "")
    for kind, words in KINDS.items():
        message = message.replace(f"Expected a <class '{kind}'>", f"expected {words}")
    if "unrecognized arguments" in message:
        message += "\nsee --help, and --data.help with the class of the data set"
    if option := re.search(r"class_path '([\w.]+)':\s+Option '\w+' is not accepted", message):
        message += f"\nsee --{key[1] if key else 'data'}.help {option[1].rpartition('.')[2]}"
    if "SeriesDataset is abstract" in message or "Expected a dot import path string" in message:
        from timo.cli.parsing import DATASETS

        names = ", ".join(dataset.__name__ for dataset in DATASETS)
        message += (
            f"\nname the class of the data set first, as --{key[1] if key else 'data'} "
            f"RasterSeries: one of {names}, or one of your own with its module"
        )
    return message


def _of_input(error: Exception) -> bool:
    """Whether an error says what is wrong with options or files, and not with the program."""
    kinds = (ValueError, TypeError, OSError, ImportError, ArgumentError)
    # Of Lightning's trainer, which is imported by the commands that need it alone.
    return isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException"
