"""Pictures of results: label maps, confusion of classes, embeddings. All need matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from timo.data import IGNORE_INDEX
from timo.data.contract import atomic_output, evenly_spaced
from timo.data.page import figure

POINTS = 5000  # of embeddings
MAPS, PIXELS = 9, 500  # of a series: how many, and pixels of the longer side of each
NUMBERED = 20  # classes of a confusion matrix whose shares are written out

# Of few classes; the first is mostly what the others are looked for in.
FEW = (
    "#dcd5c0", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2",
    "#bcbd22", "#17becf",
)  # fmt: skip

Colour = tuple[int, int, int]  # red, green, blue; 0 ... 255


def save(drawn, path: str | Path) -> None:
    """Write a matplotlib figure as PNG; it appears complete or not at all."""
    with atomic_output(path) as partial:
        drawn.savefig(partial, format="png", dpi=150)


def class_colours(count: int) -> list[Colour]:
    """A colour for each of `count` classes, the same in pictures, maps and legends."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if count <= len(FEW):
        chosen = [to_rgb(name) for name in FEW[:count]]
    else:
        table = colormaps["tab20"] if count <= 20 else colormaps["turbo"].resampled(count)
        chosen = [table(i)[:3] for i in range(count)]
    return [tuple(round(255 * x) for x in colour) for colour in chosen]  # type: ignore[misc]


def change_colours(count: int) -> list[Colour]:
    """Colours of first * count + last: that of the class that came, pale where nothing changed."""
    colours = class_colours(count)
    pale = [tuple((x + 3 * 255) // 4 for x in colour) for colour in colours]
    return [
        pale[last] if first == last else colours[last]  # type: ignore[misc]
        for first in range(count)
        for last in range(count)
    ]


def _label(name: str) -> str:
    """A name as matplotlib shows it: no formula, and not without end."""
    return (name if len(name) <= 40 else f"{name[:39]}…").replace("$", r"\$")


def map_picture(
    panels: np.ndarray, titles: Sequence[str], names: Sequence[str], colours: Sequence[Colour]
):
    """A matplotlib figure of maps of classes; 255 is white.

    Args:
        panels: (maps, h, w) uint8.
        titles: of the maps.
        names, colours: of the classes 0, 1, ... Those that occur are in the legend.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    _, high, wide = panels.shape
    inches = 4 / max(high, wide)
    present = [i for i in np.unique(panels) if i < len(names)]
    across = max(1.5, wide * inches), 0.5 + high * inches  # of a panel, with its title
    # 40 names to a column of the legend, each 0.2 inches high.
    legend = -(-len(present) // 40)
    size = columns * across[0] + 3 * max(1, legend), max(rows * across[1], 0.2 * len(present[:41]))
    drawn, axes = figure(rows, columns, *size)
    table = np.full((IGNORE_INDEX + 1, 3), 255, np.uint8)
    table[: len(colours)] = colours
    for one in axes:
        one.set_axis_off()
    for one, panel, title in zip(axes, panels, titles):
        one.imshow(table[panel], interpolation="nearest")
        one.set_title(title, fontsize=9)
    marks = [axes[0].scatter([], [], marker="s", color=np.divide(colours[i], 255)) for i in present]
    if marks:
        shown = [_label(names[i]) for i in present]
        drawn.legend(marks, shown, loc="outside right upper", fontsize=8, ncols=legend)
    return drawn


def confusion_picture(counts: np.ndarray, classes: Sequence[str]):
    """A matplotlib figure of how the labels of each class were predicted.

    Args:
        counts: (classes, classes) of labels (rows) and predictions (columns).
        classes: their names.
    """
    side = min(14.0, 3 + 0.5 * len(classes))
    drawn, (axes,) = figure(1, 1, side + 1, side)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    drawn.colorbar(shown, ax=axes, label="share of the label", shrink=0.8)
    names = [_label(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    for (i, j), share in np.ndenumerate(shares):
        if len(classes) <= NUMBERED and share > 0:
            colour = "white" if share > 0.5 else "black"
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    return drawn


def components_picture(values: np.ndarray, title: str):
    """A matplotlib figure of a map of embeddings: principal components as red, green and blue.

    Args:
        values: (D, h, w); NaN, where there is no embedding, is white.
        title: of the picture.
    """
    channels, high, wide = values.shape
    known = np.isfinite(values).all(0)
    shown = np.ones((high, wide, 3))
    if known.any():
        x = values[:, known].T.astype(np.float64)
        x -= x.mean(0)
        _, axes = np.linalg.eigh(x.T @ x)  # in ascending order
        components = np.zeros((len(x), 3))
        components[:, : min(3, channels)] = (x @ axes)[:, : -min(3, channels) - 1 : -1]
        low, top = np.percentile(components, (2, 98), axis=0)
        shown[known] = np.clip((components - low) / np.where(top > low, top - low, 1), 0, 1)
    inches = 8 / max(high, wide)
    drawn, (picture,) = figure(1, 1, wide * inches, high * inches + 0.4)
    picture.imshow(shown, interpolation="nearest")
    picture.set_title(f"{_label(title)}: principal components as red, green and blue", fontsize=9)
    picture.set_axis_off()
    return drawn


def embedding_picture(table: dict[str, np.ndarray]):
    """A matplotlib figure of the first two principal components of embeddings.

    Points are coloured by label where there are some, those of 255 grey; else by date, or where a
    series has one date as all of its rows do, by series.

    Args:
        table: as from `embed_series`; of many rows `POINTS` are drawn, evenly spaced.
    """
    drawn, (axes,) = figure(1, 1, 8, 6)
    known = np.flatnonzero(np.isfinite(table["embedding"]).all(1))
    chosen = known[evenly_spaced(len(known), POINTS)]
    axes.set_title(f"{len(chosen)} of {len(table['name'])} embeddings")
    if not len(chosen):
        return drawn
    x = table["embedding"][chosen].astype(np.float64)
    left, spread, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    points = np.zeros((len(x), 2))
    points[:, : len(spread)] = (left * spread)[:, :2]
    shares = np.zeros(2)
    shares[: len(spread)] = spread[:2] ** 2 / max((spread**2).sum(), np.finfo(np.float64).tiny)
    axes.set_xlabel(f"principal component 1, {shares[0]:.0%} of variance")
    axes.set_ylabel(f"principal component 2, {shares[1]:.0%} of variance")
    names, starts = table["name"][chosen], table["start"][chosen].astype("datetime64[D]")
    if "label" in table:
        _draw_groups(drawn, axes, points, table["label"][chosen], "label")
    elif len({*zip(names, starts)}) == len({*names}) > 1:
        _draw_groups(drawn, axes, points, names, "series")
    else:
        years = 1970 + starts.astype(np.int64) / 365.25
        dots = axes.scatter(*points.T, c=years, s=10, cmap="viridis")
        bar = drawn.colorbar(dots, ax=axes, label="first date (year)")
        bar.formatter.set_useOffset(False)
    return drawn


def _draw_groups(drawn, axes, points: np.ndarray, group: np.ndarray, title: str) -> None:
    """Points (R, 2) in a colour for each group, with a legend of up to 40; 255 is none, in grey."""
    from matplotlib import colormaps

    known = np.unique(group[group != IGNORE_INDEX] if group.dtype.kind == "i" else group)
    colours = colormaps["tab20" if len(known) <= 20 else "turbo"].resampled(max(1, len(known)))
    if len(known) < len(np.unique(group)):
        axes.scatter(*points[group == IGNORE_INDEX].T, color="lightgrey", s=10, label="none")
    for i, one in enumerate(known):
        axes.scatter(*points[group == one].T, color=colours(i), s=10, label=_label(str(one)))
    if len(known) <= 40:
        drawn.legend(loc="outside right upper", title=title)
