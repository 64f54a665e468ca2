"""The demonstration's page: curves, reconstructions, maps and every figure."""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timo.data import RasterSeries, collate_series, mndwi
from timo.data.page import figure, image, table, write_html
from timo.data.windows import import_rasterio
from timo.models.masking import least_usable, usable_units
from timo.ops.gather_units import visible_pixels
from timo.tasks import PretrainingTask

WATER = {0: "#e9e4d4", 1: "#2b6ca3", 255: "#ffffff"}
CHANGE = {0: "#e9e4d4", 1: "#1aa3c8", 2: "#c8641a", 3: "#23405c", 255: "#ffffff"}
CHANGE_NAMES = {0: "land", 1: "land to water", 2: "water to land", 3: "water"}


def write_report(
    out: Path, root: Path, figures: dict, task: PretrainingTask, east: RasterSeries
) -> None:
    """Write report.html from the runs, maps and figures in `out`.

    Args:
        out: folder of the demonstration.
        root: folder of the rasters.
        figures: what figures.json holds.
        task: the pretrained autoencoder.
        east: windows of the eastern part, that the autoencoder never saw.
    """
    whole = RasterSeries(root, bands=east.bands, nodata=0)
    sample = whole[0]
    days = [str(d) for d in whole.series[0].dates.astype("datetime64[D]")]
    labels, change = _read(out / "water.tif"), _read(out / "change.tif")[0]
    pretraining = _losses(out / "pretraining")
    finetuning = {name: _losses(out / name.replace(" ", "_")) for name in figures["east"]}
    rows = [
        (name, *(f"{s[f'test/{key}']:.4f}" for key in ("iou/water", "f1/water", "accuracy")))
        for name, s in figures["east"].items()
    ]
    steps = figures["steps"]
    parts = [
        "<h1>Open water, date by date</h1>",
        f"<p>{figures['source']}; {len(days)} dates from {days[0]} to {days[-1]}, "
        f"{whole.series[0].height} &times; {whole.series[0].width} pixels, bands "
        f"{', '.join(east.bands)}. <code>timo_tiny</code> was pretrained without labels and "
        "fine-tuned on water masks derived from a spectral index (MNDWI &gt; 0), both on the "
        "western 60 % only. All scores below are of the eastern 40 %.</p>",
        "<h2>Agreement with the index on the unseen eastern part</h2>",
        table(("fine-tuned from", "IoU water", "F1 water", "accuracy"), rows),
        f"<p class='note'>Both were fine-tuned for {steps['fine-tuning']} steps with the same "
        "seed and batches. The masks come from the same pixels, so this shows that the pipeline "
        "learns and generalises in space; it is no claim of accuracy against ground truth.</p>",
        "<h2>Maps</h2>",
        _maps(sample["image"], labels, change, days),
        _area(sample, labels, days, east.bands),
        "<h2>Pretraining: reconstruction of hidden units</h2>",
        "<p>A window of the unseen eastern part. Three quarters of its 32 &times; 32 units are "
        "hidden, at random over all dates.</p>",
        _reconstruction(task, east),
        "<h2>Losses</h2>",
        _curves(pretraining, finetuning),
        "<p class='note'>In pretraining, predicting each band's mean would cost about 1.</p>",
        "<h2>Every figure</h2>",
        table(("figure", "value"), _flat(figures)),
    ]
    write_html(out / "report.html", "timo: open water, date by date", parts)


def false_colour(frames: Tensor) -> np.ndarray:
    """SWIR1, NIR, Red as RGB in 0 ... 1, (T, H, W, 3), one stretch for all dates."""
    rgb = frames[:, :3].float().movedim(1, -1)
    used = rgb[rgb.sum(-1) > 0]
    step = max(1, len(used) // 100_000)
    low, high = used[::step].quantile(torch.tensor([0.02, 0.98]), dim=0)
    return ((rgb - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).numpy()


def _read(path: Path) -> np.ndarray:
    with import_rasterio().open(path) as file:
        return file.read()


def _losses(run: Path) -> np.ndarray:
    """Training loss of every logged step."""
    with (run / "logs" / "metrics.csv").open() as file:
        return np.array([float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]])


def _curves(pretraining: np.ndarray, finetuning: dict[str, np.ndarray]) -> str:
    drawn, (left, right) = figure(1, 2, 11, 3.4)
    left.plot(pretraining, color="#9db7d1", linewidth=0.8)
    left.plot(_smooth(pretraining), color="#2b6ca3")
    left.set_title("pretraining: squared error of hidden pixels (standardised)", fontsize=9)
    for (name, losses), color in zip(finetuning.items(), ("#2b6ca3", "#c8641a")):
        right.plot(losses, color=color, linewidth=0.6, alpha=0.4)
        right.plot(_smooth(losses), color=color, label=name)
    right.set_title("fine-tuning: cross-entropy", fontsize=9)
    right.set_yscale("log")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    return image(drawn, "loss curves")


def _smooth(losses: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    out, total, norm = np.empty_like(losses), 0.0, 0.0
    for i, loss in enumerate(losses):
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        out[i] = total / norm
    return out


@torch.inference_mode()
def _reconstruction(task: PretrainingTask, east: RasterSeries) -> str:
    """Input, masked input, reconstruction and error of the window with the most water."""
    windows = [east[i] for i in range(len(east))]
    chosen = max(windows, key=lambda sample: int((sample["mask"] == 1).sum()))
    shown = torch.linspace(0, len(chosen["dates"]) - 1, 4).long()
    picked = {key: chosen[key][shown] for key in ("image", "dates", "valid")}
    batch = collate_series([picked | {"name": chosen["name"]}])
    units = least_usable(batch["image"], usable_units(batch["image"], batch["valid"]))
    result = task(batch | {"key": torch.tensor([0]), "units": units})
    frames, (scale, offset) = batch["image"].float(), task.input_units()
    visible = visible_pixels(frames, result.visible_ids, None, 32)  # [1, T, 1, H, W]
    predicted = _assemble(result.pred, result.masked_ids, frames.shape)
    predicted = (predicted - offset[:, None, None]) / scale[:, None, None]
    rebuilt = torch.where(visible, frames, predicted)
    error = ((rebuilt - frames) * scale[:, None, None]).abs().mean(2)[0]  # [T, H, W]
    pictures = false_colour(torch.cat([frames[0], rebuilt[0]]))
    seen, guess = pictures[: len(shown)], pictures[len(shown) :]
    hidden = np.where(visible[0, :, 0, ..., None].numpy(), seen, 0.5)
    drawn, axes = figure(len(shown), 4, 8.5, 2.05 * len(shown))
    titles = ("input", "what the model sees", "reconstruction", "absolute error")
    for row in range(len(shown)):
        day = str(np.datetime64(int(batch["dates"][0, row]), "D"))
        line = axes[4 * row : 4 * row + 4]
        for axis, picture in zip(line, (seen[row], hidden[row], guess[row])):
            axis.imshow(picture, interpolation="nearest")
        drawn_error = line[3].imshow(error[row], cmap="magma", vmin=0, vmax=2)
        line[0].set_ylabel(day, fontsize=8)
        for axis, title in zip(line, titles):
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title, fontsize=9)
    drawn.colorbar(drawn_error, ax=list(axes[3::4]), shrink=0.5, label="standard deviations")
    return image(drawn, "reconstruction of hidden units")


def _assemble(pred: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    """Predicted units (B, M, C·32·32) at their places in frames of `shape`, 0 elsewhere."""
    B, T, C, H, W = shape
    h, w = H // 32, W // 32
    units = pred.new_zeros(B, T * h * w, C * 32 * 32)
    units.scatter_(1, ids[..., None].expand_as(pred), pred)
    units = units.view(B, T, h, w, C, 32, 32).permute(0, 1, 4, 2, 5, 3, 6)
    return units.reshape(shape)


def _maps(frames: Tensor, labels: np.ndarray, change: np.ndarray, days: list[str]) -> str:
    from matplotlib.patches import Patch

    pictures = false_colour(frames)
    drawn, axes = figure(3, 2, 11, 10.2)
    for axis, index in zip(axes[:2], (0, -1)):
        axis.imshow(pictures[index])
        axis.set_title(f"SWIR1, NIR, Red, {days[index]}", fontsize=9)
    for axis, index in zip(axes[2:4], (0, -1)):
        axis.imshow(_paint(labels[index], WATER))
        axis.set_title(f"predicted water, {days[index]}", fontsize=9)
    axes[4].imshow(_paint(change, CHANGE))
    axes[4].set_title(f"change {days[0]} to {days[-1]}", fontsize=9)
    patches = [Patch(color=CHANGE[code], label=name) for code, name in CHANGE_NAMES.items()]
    axes[4].legend(handles=patches, fontsize=8, loc="lower left")
    often = (labels == 1).sum(0) / np.maximum((labels != 255).sum(0), 1)
    occurrence = axes[5].imshow(often, cmap="Blues", vmin=0, vmax=1)
    axes[5].set_title(f"share of the {len(days)} dates with water", fontsize=9)
    drawn.colorbar(occurrence, ax=axes[5], shrink=0.7)
    for axis in axes:
        axis.axvline(0.6 * change.shape[1], color="black", linewidth=0.8, linestyle="--")
        axis.set(xticks=[], yticks=[])
    note = "<p class='note'>West of the dashed line the models were trained, east of it not.</p>"
    return image(drawn, "maps of water and change") + note


def _paint(codes: np.ndarray, colours: dict[int, str]) -> np.ndarray:
    from matplotlib.colors import to_rgb

    palette = np.ones((256, 3))
    for code, colour in colours.items():
        palette[code] = to_rgb(colour)
    return palette[codes]


def _area(sample: dict, labels: np.ndarray, days: list[str], bands: tuple[str, ...]) -> str:
    """Share of water in the eastern part by date, predicted and by the index."""
    start = round(0.6 * labels.shape[-1])
    valid = sample["valid"].numpy()[..., start:]
    index = (mndwi(sample["image"], bands) > 0).numpy()[..., start:]
    by_index = [100 * i[v].mean() for i, v in zip(index, valid)]
    predicted = [100 * (p == 1)[v].mean() for p, v in zip(labels[..., start:], valid)]
    drawn, (axis,) = figure(1, 1, 8, 2.8)
    axis.plot(days, by_index, "o-", color="#777777", label="index")
    axis.plot(days, predicted, "o-", color="#2b6ca3", label="predicted")
    axis.set_ylabel("water, % of valid pixels", fontsize=8)
    axis.set_title("eastern part", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return image(drawn, "share of water by date")


def _flat(record: dict, prefix: str = "") -> list[tuple[str, object]]:
    rows = []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}, ")
        else:
            rows.append((name, f"{value:.4f}" if isinstance(value, float) else value))
    return rows
