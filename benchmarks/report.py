"""Results as JSON, as a Markdown table and as a plot. Nothing half-written stays behind."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .ops import load
from .runner import DIRECTIONS, compare


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Name to write to in place of `path`; it becomes `path` if the block ends well."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def write(folder: Path, environment: dict, rows: Sequence[dict], plot: bool = True) -> list[Path]:
    """ops.json, ops.md and, where matplotlib is installed, ops.png; returns what was written."""
    rows = compare(rows)
    paths = [folder / "ops.json", folder / "ops.md"]
    write_json(paths[0], {"environment": environment, "rows": rows})
    with atomic(paths[1]) as partial:
        partial.write_text(markdown(environment, rows))
    if plot and any(row["seconds"] for row in rows):
        try:
            write_plot(folder / "ops.png", rows)
        except ImportError as error:
            print(f"no plot: {error.name} is not installed")
        else:
            paths.append(folder / "ops.png")
    return paths


COLUMNS = (
    "direction", "implementation", "time", "10 % to 90 %", "CPU time", "peak memory", "FLOP/s",
    "of matmul", "of copy", "of floor", "speed-up", "over best other",
)  # fmt: skip


def cells(row: dict) -> list[str]:
    """A row of a table, as the columns ask; a row without time keeps only its names."""
    time = row["seconds"]
    if time is None:
        return [row["direction"], row["name"], row["note"] or "", *[""] * (len(COLUMNS) - 3)]
    peak, flop, faster = time["peak_bytes"], row["flop_rate"], row["speedup"]
    return [
        row["direction"],
        row["name"],
        duration(time["median"]),
        f"{duration(time['low'])} to {duration(time['high'])}",
        "" if time["cpu"] is None else duration(time["cpu"]),
        "" if peak is None else f"{peak / 2**20:.0f} MiB",
        f"{flop / 1e9:.0f} G" if flop else "",
        *(f"{row[key]:.0%}" if row[key] else "" for key in ("of_matmul", "of_copy", "of_floor")),
        *(_speedup(faster.get(key)) for key in ("baseline", "best other")),
    ]


def _speedup(over: Sequence | None) -> str:
    return f"{over[1]:.2f} × {over[0]}" if over else ""


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = ("s", 1) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    value = seconds / size
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def problems(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Rows by op, shape and dtype, in the order in which they came."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], tuple(row["shape"]), row["dtype"]), []).append(row)
    return groups


def title(op: str, shape: Sequence[int], dtype: str) -> str:
    sizes = ", ".join(f"{n}={size}" for n, size in zip(load(op).LAYOUT.split(","), shape))
    return f"{op}, {sizes}, {dtype}"


def markdown(environment: dict, rows: Sequence[dict]) -> str:
    """All rows, a section for every op, shape and dtype."""
    lines = ["# Benchmark results", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items()]
    return "\n\n".join(["\n".join(lines), *map(section, problems(rows).values())]) + "\n"


def section(rows: Sequence[dict]) -> str:
    """The rows of one op, shape and dtype."""
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, ordered(rows))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in table)
    below = [f"- {line}" for line in gaps(rows)]
    return "\n\n".join([f"## {heading(rows)}", conditions(rows), table, "\n".join(below)]).rstrip()


def heading(rows: Sequence[dict]) -> str:
    first = rows[0]
    return title(first["op"], first["shape"], first["dtype"])


def conditions(rows: Sequence[dict]) -> str:
    floors = {row["direction"]: duration(row["floor_seconds"]) for row in rows}
    return (
        f"Measured beside it: matrix product {rows[0]['matmul_rate'] / 1e9:.0f} GFLOP/s, copy "
        f"{rows[0]['copy_rate'] / 1e9:.1f} GB/s. Floors: "
        f"{', '.join(f'{direction} {floor}' for direction, floor in floors.items())}."
    )


def ordered(rows: Sequence[dict]) -> list[dict]:
    """By direction, without those that belong below the table."""
    shown = [row for row in rows if not left_out(row)]
    return sorted(shown, key=lambda row: DIRECTIONS.index(row["direction"]))


def gaps(rows: Sequence[dict]) -> list[str]:
    """What was not run, in which directions and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in filter(left_out, rows):
        found.setdefault((row["name"], row["note"]), []).append(row["direction"])
    return [f"not run: `{name}`, {', '.join(d)}: {why}" for (name, why), d in found.items()]


def left_out(row: dict) -> bool:
    """Whether a row belongs below the table: it could not run. A wrong one is shown in it."""
    return row["seconds"] is None and not row["note"].startswith("wrong")


def write_plot(path: Path, rows: Sequence[dict]) -> None:
    """Median time of every implementation over the shapes, a panel for every op and direction."""
    import matplotlib
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["seconds"]]
    panels = list(dict.fromkeys((row["op"], row["direction"]) for row in timed))
    names = list(dict.fromkeys(row["name"] for row in timed))
    colormap = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    places = {name: (i + 0.5) / len(names) - 0.5 for i, name in enumerate(names)}
    figure = Figure(figsize=(11, 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (op, direction) in zip(axes, panels):
        inside = [r for r in timed if (r["op"], r["direction"]) == (op, direction)]
        keys = list(problems(inside))
        for name in names:
            points = [(keys.index((op, tuple(r["shape"]), r["dtype"])), r["seconds"])
                      for r in inside if r["name"] == name]  # fmt: skip
            if points:
                x, times = zip(*points)
                x = [i + 0.6 * places[name] for i in x]
                middle = [t["median"] for t in times]
                reach = [[m - t["low"] for m, t in zip(middle, times)],
                         [t["high"] - m for m, t in zip(middle, times)]]  # fmt: skip
                colour = colormap(names.index(name))
                axis.errorbar(x, middle, reach, fmt="o", color=colour, label=name, capsize=2)
        for i, group in enumerate(problems(inside).values()):
            axis.hlines(group[0]["floor_seconds"], i - 0.3, i + 0.3, color="black",
                        label="floor" if i == 0 else None)  # fmt: skip
        axis.set_yscale("log")
        axis.set_ylabel("seconds")
        axis.set_title(f"{op}, {direction}")
        axis.set_xticks(range(len(keys)), [f"{','.join(map(str, s))}\n{d}" for _, s, d in keys])
        axis.tick_params("x", labelsize="small", rotation=20 if len(keys) > 6 else 0)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic(path) as partial:
        figure.savefig(partial, dpi=100)
