"""The check report as one self-contained HTML page."""

import math
from pathlib import Path

import numpy as np

from timo.data.check import CheckReport, SampleFacts
from timo.data.contract import IGNORE_INDEX, evenly_spaced
from timo.data.page import figure, image, table, text, write_html

_SAMPLES, _DATES, _COLUMNS = 6, 96, 8  # pictures of so many samples and dates


def write_page(report: CheckReport, out: Path) -> None:
    """Write `report` to `out`, whole or not at all; raises ImportError without matplotlib."""
    write_html(out, "Dataset check", _page(report))


def _page(report: CheckReport) -> list[str]:
    parts = [
        f"<h1>{'No errors found' if report.ok else 'Errors found'}</h1>",
        f"<p>{report.total} samples, {len(report.samples)} looked at. Bands: "
        f"{text(', '.join(report.bands))}. Units: {text(report.units)}.</p>",
        "<h2>Problems</h2>",
        table(
            ("", "where", "what"),
            [(p.severity, p.where, p.text) for p in report.problems],
            [p.severity for p in report.problems],
        ) if report.problems else "<p>None.</p>",
    ]  # fmt: skip
    if report.samples:
        parts += ["<h2>Samples</h2>", table(_HEAD, [_row(facts) for facts in report.samples])]
        parts += ["<h2>Values</h2>", _histograms(report)]
    if report.labels:
        total = sum(report.labels.values())
        names = dict(enumerate(report.classes)) | {IGNORE_INDEX: "(ignore)"}
        rows = [
            (label, names.get(label, ""), count, f"{count / total:.2%}")
            for label, count in sorted(report.labels.items())
        ]
        parts += ["<h2>Labels</h2>", table(("label", "class", "count", "share"), rows)]
    if report.samples:
        parts.append(_DATES_HEAD)
    for facts in report.samples[:_SAMPLES]:
        parts += [f"<h3>{text(facts.name)}</h3>", _pictures(facts)]
    return parts


_DATES_HEAD = (
    "<h2>Dates</h2><p>One stretch for all dates of a sample; pixels that are not valid are tinted "
    "magenta. Labels of pixels lie below; those of dates stand in brackets.</p>"
)
_HEAD = ("name", "T, C, H, W", "first", "last", "longest gap", "valid", "worst date", "NaN")


def _row(facts: SampleFacts) -> tuple:
    gaps = np.diff(np.array(facts.dates, dtype="datetime64[D]")).astype(int)
    worst = int(np.argmin(facts.valid))
    return (
        facts.name,
        ", ".join(map(str, facts.shape)),
        facts.dates[0],
        facts.dates[-1],
        f"{gaps.max()} days" if len(gaps) else "",
        f"{np.mean(facts.valid):.1%}",
        f"{facts.dates[worst]} ({facts.valid[worst]:.1%})",
        sum(facts.nonfinite),
    )


def _histograms(report: CheckReport) -> str:
    pixels = np.concatenate([facts.pixels for facts in report.samples], axis=1)
    if pixels.shape[1] == 0:
        return "<p>No pixel is valid.</p>"
    columns = min(4, len(report.bands))
    rows = math.ceil(len(report.bands) / columns)
    drawn, axes = figure(rows, columns, 3.2 * columns, 2.2 * rows)
    for axis, band, values in zip(axes, report.bands, pixels):
        axis.hist(values, bins=80, color="#3a6ea5")
        axis.set_title(f"{band}: {values.mean():.4g} ± {values.std():.4g}", fontsize=9)
        axis.set_xlabel(report.units, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    for axis in axes[len(report.bands) :]:
        axis.axis("off")
    return image(drawn, "distribution of valid values by band")


def _pictures(facts: SampleFacts) -> str:
    shown = evenly_spaced(len(facts.dates), _DATES)
    by_date = len(facts.masks) == len(facts.dates) > 1
    dated = len(facts.classes) == len(facts.dates)
    panels = [
        (f"{facts.dates[i]}  {facts.valid[i]:.0%}" + (f"  [{facts.classes[i]}]" if dated else ""),
         [facts.thumbnails[i], *([_colored(facts.masks[i])] if by_date else [])])
        for i in shown
    ]  # fmt: skip
    if facts.masks and not by_date:
        panels.append(("labels", [_colored(facts.masks[0])]))
    h, w = facts.thumbnails[0].shape[:2]
    columns = min(_COLUMNS if h >= w else 4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 13 / columns
    height = width * h / w * (2 if by_date else 1) + 0.3
    drawn, axes = figure(rows, columns, 13, height * rows)
    for axis, (title, images) in zip(axes, panels):
        axis.imshow(np.concatenate(images), interpolation="nearest")
        axis.set_title(title, fontsize=8)
    for axis in axes:
        axis.axis("off")
    rest = len(facts.dates) - len(shown)
    note = f"<p>{rest} more dates are not shown.</p>" if rest else ""
    if facts.classes and not dated:
        note += f"<p>Label {facts.classes[0]}.</p>"
    return image(drawn, f"dates of {facts.name}") + note


def _colored(mask: np.ndarray) -> np.ndarray:
    """Labels as colours (h, w, 3); 255 is light grey."""
    from matplotlib import colormaps

    colors = colormaps["tab20"](mask % 20)[..., :3]
    colors[mask == IGNORE_INDEX] = 0.85
    return colors
