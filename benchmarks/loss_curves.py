"""Loss curves of the autoencoder and of the dense published form on real Landsat tiles.

Usage: python -m benchmarks.loss_curves --out FOLDER [--data ../shared/data] [--steps 300]
           [--seeds 6]
Runs of timo_tiny, for each seed from the same weights, with the same batches and visible units: the
dense form, and the fast path with either choice of the stem's batch statistics ("all" positions of
the masked frames, as published, or the "visible" ones). Writes loss_curves.json and
loss_curves.png; fails where the fast path with published statistics is further from the dense form
of the same seed than dense runs of two seeds are from each other, on average over seeds and pairs.
"""

import argparse
import os
from collections.abc import Iterable, Iterator
from itertools import combinations, count
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import timo
from timo.data import RasterSeries
from timo.models.masking import draw_units, unit_grid, visible_count
from timo.tasks import SeriesData

from . import harness, report
from .dense_mae import DenseAutoencoder

BANDS = ("SWIR1", "NIR", "Red", "Green")
DECODER = {"decoder_embed_dim": 192, "decoder_num_heads": 6, "decoder_depth": 2}
RATE, DECAY = 4e-4, 0.95  # learning rate; weight of the past in smoothed curves
DENSE, OTHERS = "dense form", "dense form, between seeds"
ALL, VISIBLE = (f"fast path, statistics of {which} positions" for which in ("all", "visible"))


def batches(data: SeriesData) -> Iterator[dict]:
    """Batches of one epoch after another."""
    for epoch in count():
        loader = data.train_dataloader()
        data.set_epoch(epoch)
        yield from loader


def train(root: Path, form: str, seed: int, steps: int) -> list[float]:
    """Losses of `steps` steps, with a warm-up over the first tenth of them."""
    series = RasterSeries(root, bands=BANDS, nodata=0, tile=64, stride=32, min_valid=1, cache=True)
    data = SeriesData(series, batch_size=8, dates=4, seed=seed)
    units = data.normalisation()
    scale = units["scale"] / units["deviation"]
    offset = (units["offset"] - units["mean"]) / units["deviation"]
    torch.manual_seed(seed)
    options: dict[str, Any] = DECODER | {"stem_statistics": "visible" if form == VISIBLE else "all"}
    model = timo.create_model("timo_tiny", "mae", len(BANDS), pixel_norm="patch", **options).train()
    dense = DenseAutoencoder(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.05)
    losses = []
    for step, batch in zip(track(range(steps), f"{form}, seed {seed}"), batches(data)):
        frames: Tensor = batch["image"]
        grid = unit_grid(frames)
        ids = draw_units(batch["key"], grid, visible_count(grid[0] * grid[1] * grid[2], 0.75))
        if form == DENSE:
            image = frames.float() * scale[:, None, None] + offset[:, None, None]
            loss = dense(image, ids)
        else:
            loss = model(frames, visible_ids=ids, scale=scale, offset=offset).loss
        optimizer.param_groups[0]["lr"] = RATE * min(1, 10 * (step + 1) / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 7))
    return losses


def smooth(losses: list[float]) -> Tensor:
    """Exponential moving average, corrected for its start."""
    out, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = DECAY * total + (1 - DECAY) * loss, DECAY * weight + (1 - DECAY)
        out.append(total / weight)
    return torch.tensor(out, dtype=torch.float64)


def distances(curves: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Root mean square differences of smoothed curves, given as a list over seeds for each form.

    Returns:
        For each other form its distances from the dense run of the same seed; and those between
        the dense runs of every two seeds.
    """
    smoothed = {form: [smooth(losses) for losses in runs] for form, runs in curves.items()}
    others = {form: runs for form, runs in smoothed.items() if form != DENSE}
    pairs: dict[str, Iterable] = {form: zip(runs, smoothed[DENSE]) for form, runs in others.items()}
    pairs[OTHERS] = combinations(smoothed[DENSE], 2)
    return {name: [(a - b).square().mean().sqrt().item() for a, b in pairs[name]] for name in pairs}


def plot(path: Path, curves: dict[str, list[list[float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    smoothed = {form: torch.stack([smooth(run) for run in runs]) for form, runs in curves.items()}
    styles = {VISIBLE: ("#2b6ca3", "-"), DENSE: ("#c8641a", "-"), ALL: ("#23405c", "--")}
    for form, (colour, line) in styles.items():
        for run in smoothed[form]:
            above.plot(run, line, color=colour, linewidth=0.6, alpha=0.5)
        above.plot(smoothed[form].mean(0), line, color=colour, label=f"{form} (mean in bold)")
    dense = smoothed[DENSE]
    spread = (dense.amax(0) - dense.amin(0)).tolist()
    steps, lowest = range(len(spread)), [-width for width in spread]
    label = "dense form, largest difference of two seeds"
    below.fill_between(steps, lowest, spread, color="#c8641a", alpha=0.2, label=label)
    for i, run in enumerate(smoothed[ALL] - dense):
        label = "fast path less dense form, same seed" if i == 0 else None
        below.plot(run, color="#23405c", linewidth=0.8, label=label)
    above.set(ylabel="masked error, normalised by unit")
    below.set(xlabel="step", ylabel="difference")
    above.set_title("timo_tiny, Landsat series of Pucallpa, 8 × 4 dates of 64×64", fontsize=9)
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with report.atomic(path) as partial:
        figure.savefig(partial, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("TIMO_DATA", harness.ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default), help="folder of real series")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds, at least 2")
    parser.add_argument("--out", type=Path, default=Path("runs/loss_curves"))
    options = parser.parse_args()
    root = options.data / "pucallpa_landsat"
    if not root.is_dir():
        parser.error(f"--data: {options.data} holds no folder pucallpa_landsat")
    if options.seeds < 2:
        parser.error(
            f"--seeds must be at least 2, to tell how far seeds are apart, not {options.seeds}"
        )
    curves = {
        form: [train(root, form, seed, options.steps) for seed in range(options.seeds)]
        for form in (DENSE, ALL, VISIBLE)
    }
    apart = distances(curves)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = harness.environment(torch.device("cpu"))
    record = {"environment": environment, "apart": apart, "curves": curves}
    report.write_json(options.out / "loss_curves.json", record)
    plot(options.out / "loss_curves.png", curves)
    print("Root mean square distances of smoothed curves, from the dense form of the same seed:")
    for name, values in apart.items():
        print(f"{name}: {fmean(values):.4f} on average, {min(values):.4f} to {max(values):.4f}")
    return 0 if fmean(apart[ALL]) <= fmean(apart[OTHERS]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
