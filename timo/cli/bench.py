"""`timo bench`."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from timo.benchmarks import harness, report, runner
from timo.benchmarks.ops import OPS, load
from timo.ops.checks import FLOATS, dtype_name

SHOWN = (
    "direction", "implementation", "time", "CPU time", "peak memory", "of floor", "speed-up",
    "over best other",
)  # fmt: skip

NARROW = ("direction", "implementation", "time", "of floor", "speed-up")  # below 112 characters


def bench(arguments: Sequence[str]) -> int:
    """Time an op's backends and what PyTorch offers instead of them."""
    options = _parse(arguments)
    out = options.out
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is {out}, a file; it must be a folder, which may not exist yet")
        out.mkdir(parents=True, exist_ok=True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    environment = harness.environment(options.device)
    rows: list[dict] = []
    with _Screen(len(options.problems)) as screen:
        for op, shape, dtype in options.problems:
            screen.say(op, "inputs and exact results")
            problem = load(op).problem(shape, dtype, options.device)
            found = list(runner.run(
                op, shape, dtype, options.device, problem,
                names=_names(options.backend, problem), directions=options.direction,
                budget=options.seconds, notify=partial(screen.say, op),
            ))  # fmt: skip
            rows += found
            if not found:
                raise ValueError(f"direction is backward or both, but {op} has no gradient")
            screen.show(runner.compare(found))
            if out is not None:
                report.write(out, environment, rows, plot=False)
    if out is not None:
        for path in report.write(out, environment, rows):
            print(path)
    return int(any(row["ours"] and (row["note"] or "").startswith("wrong") for row in rows))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "timo bench",
        description=bench.__doc__,
        epilog="Each must give the right results first; what does not gets no time and no "
        "speed-up, and if it is a backend, the exit code is 1. docs/benchmarks.md explains the "
        "columns.",
    )
    add = parser.add_argument
    add("ops", nargs="*", help=f"all unless named: {', '.join(OPS)}")
    add("--shape", action="append", help="sizes, as 1,10,3136,4,32; may be repeated")
    add("--full", action="store_true", help="on CPUs too, all shapes of the table for GPUs")
    add("--dtype", action="append", help="default float32, on GPUs bfloat16; may be repeated")
    add("--device", help="cpu, cuda or cuda:1; default: a GPU if there is one")
    add("--backend", help="backends and baselines to run, as cpp,direct; default all")
    add("--direction", default=",".join(runner.DIRECTIONS), help="default %(default)s")
    add("--seconds", type=float, default=1.0, help="of repetition of each; default %(default)s")
    add("--threads", type=int, help="of the CPU; default: as torch has it")
    add("--out", type=Path, help="folder for ops.json, ops.md and ops.png")
    options = parser.parse_args(arguments)
    options.device = _device(options.device)
    usual = "float32" if options.device.type == "cpu" else "bfloat16"
    dtypes = [_dtype(name) for name in options.dtype or [usual]]
    options.direction = options.direction.split(",")
    if unknown := set(options.direction) - set(runner.DIRECTIONS):
        raise ValueError(
            f"direction names {sorted(unknown)}; it must be among {', '.join(runner.DIRECTIONS)}, "
            "separated by commas"
        )
    for name in ("seconds", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be more than 0")
    if options.shape and len(options.ops) != 1:
        raise ValueError("shape needs one op, since sizes mean something else for every op")
    options.problems = [
        (op, shape, dtype)
        for op in options.ops or OPS
        for dtype in dtypes
        for shape in _shapes(op, options)
    ]
    return options


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; only cpu and cuda can be timed")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}; torch sees {torch.cuda.device_count()} GPUs")
    return device


def _dtype(name: str) -> torch.dtype:
    known = {dtype_name(dtype): dtype for dtype in FLOATS}
    if name not in known:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def _shapes(op: str, options: argparse.Namespace) -> list[tuple[int, ...]]:
    module = load(op)
    if not options.shape:
        on_cpu = options.device.type == "cpu" and not options.full
        return module.CPU_SHAPES if on_cpu else module.SHAPES
    shapes = []
    for text in options.shape:
        sizes = text.split(",")
        count = len(module.LAYOUT.split(","))
        if len(sizes) != count or not all(s.strip().isdecimal() and int(s) > 0 for s in sizes):
            raise ValueError(
                f"shape is {text!r}; {op} needs {module.LAYOUT}: {count} numbers of at least 1, "
                f"as {','.join(map(str, module.CPU_SHAPES[0]))}"
            )
        shapes.append(tuple(map(int, sizes)))
    return shapes


def _names(wanted: str | None, problem: runner.Problem) -> list[str] | None:
    if wanted is None:
        return None
    names, known = wanted.split(","), {*problem.calls, *problem.skipped}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"backend names {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    return names


class _Screen:
    """A progress bar and tables, by rich; without it the tables alone, in Markdown."""

    def __init__(self, count: int):
        try:
            from rich.progress import Progress
        except ImportError:
            self.progress = None
        else:
            self.progress = Progress(transient=True)
            self.task = self.progress.add_task("", total=count)

    def __enter__(self):
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_):
        if self.progress:
            self.progress.stop()

    def say(self, op: str, what: str) -> None:
        if self.progress:
            self.progress.update(self.task, description=f"{op}: {what}")

    def show(self, rows: Sequence[dict]) -> None:
        """Print what is known of one problem."""
        if self.progress is None:
            print(report.section(rows))
            return
        from rich.table import Table

        table = Table(title=report.heading(rows), caption=report.conditions(rows))
        shown = SHOWN if self.progress.console.width >= 112 else NARROW
        places = [report.COLUMNS.index(name) for name in shown]
        for name in shown:
            table.add_column(name, overflow="fold")
        for row in report.ordered(rows):
            cells = report.cells(row)
            style = "red" if row["seconds"] is None else "bold" if row["ours"] else None
            table.add_row(*(cells[i] for i in places), style=style)
        self.progress.console.print(table)
        for line in report.gaps(rows):
            self.progress.console.print(line, markup=False, highlight=False)
        self.progress.advance(self.task)
