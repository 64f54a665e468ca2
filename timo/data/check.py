"""Look at a dataset before training on it: what it holds, and what is wrong with it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timo.data.contract import (
    IGNORE_INDEX,
    SeriesDataset,
    evenly_spaced,
    physical,
    validate_sample,
)

_RGB = (("red", "green", "blue"), ("r", "g", "b"), ("b04", "b03", "b02"), ("b4", "b3", "b2"))
_THUMBNAIL = 256  # pixels along the longer side
_PIXELS = 20_000  # of each sample, for histograms
_EMPTY = 0.001  # share of valid pixels that may be 0 in every band


@dataclass(frozen=True)
class Problem:
    """`severity` is "error" (unusable), "warning" (look at it) or "note"."""

    severity: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.text}"


@dataclass
class SampleFacts:
    """What one sample holds; lists have an entry for each date."""

    name: str
    shape: tuple[int, ...]
    dates: list[str]
    valid: list[float]
    nonfinite: list[int]
    pixels: np.ndarray  # physical (C, n), some of the valid pixels
    thumbnails: list[np.ndarray]  # (h, w, 3) in 0 ... 1, magenta over pixels that are not valid
    masks: list[np.ndarray]  # (h, w) labels, one or one for each thumbnail
    classes: list[int]  # of the whole series, or of each date
    labelled: str  # "a mask", "masks of dates", "a label", "labels of dates", or "no labels"


@dataclass
class CheckReport:
    """Result of `check_dataset`; `ok` is False where an error was found."""

    total: int
    bands: tuple[str, ...]
    units: str
    samples: list[SampleFacts] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()  # names of the labels, where the dataset states them

    @property
    def ok(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)

    def add(self, severity: str, where: str, text: str) -> None:
        self.problems.append(Problem(severity, where, text))

    def __str__(self) -> str:
        lines = [
            f"{self.total} samples, {len(self.samples)} looked at; bands {', '.join(self.bands)}; "
            f"{self.units}"
        ]
        for facts in self.samples:
            lines.append(
                f"{facts.name}: {facts.shape}, {facts.dates[0]} to {facts.dates[-1]}, "
                f"{np.mean(facts.valid):.1%} valid"
            )
        if self.labels:
            counts = (f"{label}: {count}" for label, count in sorted(self.labels.items()))
            lines.append(f"labels {', '.join(counts)}")
        return "\n".join([*lines, *map(str, self.problems), "ok" if self.ok else "not ok"])


def check_dataset(
    dataset: SeriesDataset, out: str | os.PathLike | None = None, max_samples: int = 16
) -> CheckReport:
    """Read samples of a dataset of the contract and report what they hold and what is wrong.

    Reads at most `max_samples`, evenly spaced; of a store, all bytes are compared with their
    checksums first. A sample that cannot be read is an error of the
    report, not an exception. With `out` the report is also written as one HTML page with pictures
    of every date (needs matplotlib); its folder must exist.
    """
    bands, units = tuple(dataset.bands), dataset.units
    report = CheckReport(len(dataset), bands, units, classes=getattr(dataset, "classes", ()))
    if len(dataset) == 0:
        report.add("error", "dataset", "holds no sample")
    if hasattr(dataset, "verify"):
        for text in dataset.verify():
            report.add("error", "checksum", text)
    digests: dict[bytes, str] = {}
    for index in evenly_spaced(len(dataset), max_samples):
        try:
            sample = dataset[index]
            nonfinite = _count_nonfinite(dataset, sample, index)
            validate_sample(sample, bands)
        except (ValueError, OSError) as error:
            report.add("error", f"sample {index}", str(error))
            continue
        facts = _facts(sample, dataset, nonfinite)
        report.samples.append(facts)
        _judge_dates(report, facts, sample, digests)
        _judge_values(report, facts, sample)
        _judge_labels(report, facts, sample)
    if report.samples:
        _judge_kinds(report)
        _judge_units(report, dataset)
    if out is not None:
        from timo.data.check_page import write_page

        write_page(report, Path(out))
    return report


def _count_nonfinite(dataset: SeriesDataset, sample: dict, index: int) -> list[int]:
    """NaN and infinities by date: those of the files where the dataset knows, else the sample's."""
    if hasattr(dataset, "nonfinite"):
        return [int(n) for n in dataset.nonfinite(index)]
    image = sample["image"]
    return (~image.isfinite()).any(1).sum((1, 2)).tolist()


def _facts(sample: dict, dataset: SeriesDataset, nonfinite: list[int]) -> SampleFacts:
    name = sample["name"]
    if "window" in sample:
        name += " [{}, {}]".format(*sample["window"])
    image, valid = sample["image"], sample["valid"]
    values = physical(image, dataset.scale, dataset.offset)
    pixels = values.movedim(1, 0)[:, valid]
    pixels = pixels[:, :: max(1, pixels.shape[1] // _PIXELS)]
    step = max(1, max(image.shape[-2:]) // _THUMBNAIL)
    small = np.s_[..., ::step, ::step]
    masks = []
    if "mask" in sample:
        mask = sample["mask"][small]
        masks = list(mask.reshape(-1, *mask.shape[-2:]).numpy())
    return SampleFacts(
        name=name,
        shape=tuple(image.shape),
        dates=[str(np.datetime64(int(day), "D")) for day in sample["dates"]],
        valid=valid.float().mean((1, 2)).tolist(),
        nonfinite=nonfinite,
        pixels=pixels.numpy(),
        thumbnails=_thumbnails(values[small], valid[small], dataset.bands),
        masks=masks,
        classes=sample["label"].reshape(-1).tolist() if "label" in sample else [],
        labelled=_kind_of_labels(sample),
    )


def _kind_of_labels(sample: dict) -> str:
    if "mask" in sample:
        return "a mask" if sample["mask"].ndim == 2 else "masks of dates"
    if "label" in sample:
        return "a label" if sample["label"].ndim == 0 else "labels of dates"
    return "no labels"


def _thumbnails(values: Tensor, valid: Tensor, bands: Sequence[str]) -> list[np.ndarray]:
    """One stretch for all dates, so that a change of brightness shows.

    It is the median of the dates' own stretches: a few bright cloudy dates do not darken the rest.
    """
    names = [band.lower() for band in bands]
    shown = next((rgb for rgb in _RGB if {*rgb} <= {*names}), names[:3])
    if len(shown) == 2:
        shown = shown[:1]
    rgb = values[:, [names.index(name) for name in shown]]
    clear = [frame[:, usable].numpy() for frame, usable in zip(rgb, valid) if usable.any()]
    clear = clear or [frame.flatten(1).numpy() for frame in rgb]
    limits = np.stack([np.percentile(x, (2, 98), axis=1) for x in clear])  # (dates, 2, channels)
    low, high = torch.tensor(np.median(limits, axis=0)).float()[..., None, None]
    rgb = ((rgb - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    rgb = rgb.expand(-1, 3, -1, -1).movedim(1, -1)
    tinted = 0.5 * rgb + 0.5 * torch.tensor([1.0, 0.0, 1.0])
    return list(torch.where(valid[..., None], rgb, tinted).numpy())


def _judge_dates(
    report: CheckReport, facts: SampleFacts, sample: dict, digests: dict[bytes, str]
) -> None:
    days = sample["dates"].numpy()
    if len(days) == 1:
        report.add("warning", facts.name, "has a single date; there is no time to learn from")
    gaps = np.diff(days)
    if len(gaps) > 2 and gaps.max() > 5 * max(1, np.median(gaps)):
        at = int(gaps.argmax())
        report.add(
            "note", facts.name,
            f"longest gap {gaps.max()} days after {facts.dates[at]}, median {np.median(gaps):g}",
        )  # fmt: skip
    for at in np.flatnonzero(gaps == 0).tolist():
        report.add("note", facts.name, f"two frames on {facts.dates[at]}")
    dark = [date for date, share in zip(facts.dates, facts.valid) if share == 0]
    if len(dark) == len(days):
        report.add("error", facts.name, "no pixel is valid on any date; check nodata and validity")
    elif dark:
        report.add("warning", facts.name, f"no pixel is valid on {_listed(dark)}")
    for date, frame, valid in zip(facts.dates, sample["image"], sample["valid"]):
        if not valid.any():
            continue
        digest = hashlib.sha256(frame.numpy().tobytes()).digest()
        here = f"{facts.name} on {date}"
        if digests.setdefault(digest, here) != here:
            report.add("warning", here, f"the frame is identical to {digests[digest]}")


def _judge_values(report: CheckReport, facts: SampleFacts, sample: dict) -> None:
    empty = (sample["image"] == 0).all(1)[sample["valid"]].float().mean().item()
    if empty > _EMPTY:
        report.add(
            "warning", facts.name,
            f"{empty:.1%} of the valid pixels are 0 in every band; if nothing was measured there, "
            "state nodata=0",
        )  # fmt: skip
    bad = [f"{date} ({n})" for date, n in zip(facts.dates, facts.nonfinite) if n]
    if bad:
        report.add(
            "warning", facts.name,
            f"{sum(facts.nonfinite)} pixels are NaN or infinite and count as not valid: "
            f"{_listed(bad)}",
        )  # fmt: skip
    if facts.pixels.shape[1] > 1:
        for band, values in zip(report.bands, facts.pixels):
            if values.min() == values.max():
                report.add("warning", facts.name, f"band {band} is {values[0]:g} everywhere")


def _judge_labels(report: CheckReport, facts: SampleFacts, sample: dict) -> None:
    for key in {"mask", "label"} & sample.keys():
        labels, counts = np.unique(sample[key].numpy(), return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist()):
            report.labels[label] = report.labels.get(label, 0) + count
        if labels.tolist() == [IGNORE_INDEX]:
            report.add("warning", facts.name, "every label is 255 (ignore)")


def _judge_kinds(report: CheckReport) -> None:
    """Warn where samples are not labelled alike, which no run takes."""
    first: dict[str, str] = {}
    for facts in report.samples:
        first.setdefault(facts.labelled, facts.name)
    if len(first) > 1:
        listed = ", ".join(f"{name} has {kind}" for kind, name in first.items())
        report.add("warning", "labels", f"samples are not labelled alike: {listed}")


def _judge_units(report: CheckReport, dataset: SeriesDataset) -> None:
    pixels = np.concatenate([facts.pixels for facts in report.samples], axis=1)
    if pixels.shape[1] == 0:
        return
    median = np.median(pixels, axis=1)
    if report.units == "reflectance":
        listed = ", ".join(f"{b} {m:.4g}" for b, m in zip(report.bands, median))
        if median.max() > 2:
            report.add(
                "error", "units",
                f"reflectance lies in 0 ... 1, but the medians are {listed}; the values look like "
                "digital numbers: state scale= and offset= (Sentinel-2: scale 1e-4, and offset "
                "-0.1 from processing baseline 04.00 on)",
            )  # fmt: skip
        elif ((pixels < -0.2) | (pixels > 1.6)).mean() > 0.01:
            report.add(
                "warning", "units",
                f"{((pixels < -0.2) | (pixels > 1.6)).mean():.1%} of reflectances lie outside "
                f"-0.2 ... 1.6 (medians {listed}); check scale=, offset= and nodata=",
            )  # fmt: skip
    elif report.units == "DN" and bool((dataset.scale == 1).all()):
        report.add(
            "note", "units",
            "values are digital numbers as they lie on disk; state units=, scale= and offset= "
            "where their physical meaning is known",
        )  # fmt: skip


def _listed(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
