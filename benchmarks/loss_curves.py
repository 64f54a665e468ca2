"""Loss curves of the autoencoder and of the dense published form on real Landsat tiles.

Usage: python -m benchmarks.loss_curves [--data ../shared/data] [--steps 300] --out FOLDER
Runs of timo_tiny from the same weights, with the same batches and visible units: the dense form,
and the fast path with either choice of the stem's batch statistics ("all" positions of the masked
frames, as published, or the "visible" ones); and the dense form once more with another seed of all
three. Writes loss_curves.json and loss_curves.png; fails where the fast path with published
statistics is further from the dense form than the two dense runs are from each other.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
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
DENSE, OTHER = "dense form", "dense form, other seed"
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
        losses.append(loss.item())
    return losses


def smooth(losses: list[float]) -> Tensor:
    """Exponential moving average, corrected for its start."""
    out, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = DECAY * total + (1 - DECAY) * loss, DECAY * weight + (1 - DECAY)
        out.append(total / weight)
    return torch.tensor(out, dtype=torch.float64)


def distances(curves: dict[str, list[float]]) -> dict[str, float]:
    """Root mean square difference of the smoothed curves from the first dense run's."""
    smoothed = {name: smooth(losses) for name, losses in curves.items()}
    return {
        name: (smoothed[name] - smoothed[DENSE]).square().mean().sqrt().item()
        for name in curves
        if name != DENSE
    }


def plot(path: Path, curves: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    styles = {
        OTHER: ("#b9a36b", "-"), DENSE: ("#c8641a", "-"), ALL: ("#23405c", "--"),
        VISIBLE: ("#2b6ca3", "-"),
    }  # fmt: skip
    for name, (colour, line) in styles.items():
        axis.plot(curves[name], color=colour, linewidth=0.6, alpha=0.3)
        axis.plot(smooth(curves[name]), line, color=colour, label=name)
    axis.set(xlabel="step", ylabel="masked error, normalised by unit")
    axis.set_title("timo_tiny, Landsat series of Pucallpa, 8 × 4 dates of 64×64", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with report.atomic(path) as partial:
        figure.savefig(partial, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("TIMO_DATA", harness.ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default), help="folder of real series")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/loss_curves"))
    options = parser.parse_args()
    root = options.data / "pucallpa_landsat"
    if not root.is_dir():
        parser.error(f"--data: {options.data} holds no folder pucallpa_landsat")
    runs = ((VISIBLE, VISIBLE, 0), (ALL, ALL, 0), (DENSE, DENSE, 0), (OTHER, DENSE, 1))
    curves = {name: train(root, form, seed, options.steps) for name, form, seed in runs}
    apart = distances(curves)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = harness.environment(torch.device("cpu"))
    record = {"environment": environment, "apart": apart, "curves": curves}
    report.write_json(options.out / "loss_curves.json", record)
    plot(options.out / "loss_curves.png", curves)
    for name, distance in apart.items():
        print(f"{name}: {distance:.4f} from the dense form (root mean square, smoothed)")
    return 0 if apart[ALL] <= apart[OTHER] else 1


if __name__ == "__main__":
    raise SystemExit(main())
