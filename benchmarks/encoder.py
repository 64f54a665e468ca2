"""A training step of the encoder with gyroscope attention, forward and backward: time and memory.

Usage: python -m benchmarks.encoder --out FOLDER [--model timo_base] [--dates 38] [--size 512]
           [--batch 1] [--bands 3] [--precision bfloat16] [--budget SECONDS]
Writes encoder.json and encoder.md: with and without `checkpoint_blocks`, which runs every block
again in the backward. Precision other than float32 is by autocast.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch

import timo

from . import harness, report


def measure(
    model: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    checkpoint_blocks: bool,
    budget: float,
) -> dict:
    """Time and peak memory of a step on frames of `shape` (B, T, C, H, W); a row.

    `peak_bytes` is beyond parameters and gradients, `total_bytes` all that was allocated (GPUs).
    """
    torch.manual_seed(0)
    encoder = timo.create_model(model, in_chans=shape[2], checkpoint_blocks=checkpoint_blocks)
    encoder = encoder.to(device).train()
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    frames = torch.randn(shape, device=device)

    def step():
        context = nullcontext()
        if dtype != torch.float32:
            context = torch.autocast(device.type, dtype)
        with context:
            maps = encoder(frames)
        sum(x.float().square().mean() for x in maps).backward()

    row = dict(model=model, shape=list(shape), checkpoint_blocks=checkpoint_blocks)
    try:
        timing = harness.measure(step, device, budget)
    except torch.OutOfMemoryError:
        return row | dict(note="out of memory", seconds=None, peak_bytes=None, total_bytes=None)
    total = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    seconds = dict(median=timing.median, low=timing.low, high=timing.high, runs=timing.runs)
    return row | dict(note=None, seconds=seconds, peak_bytes=timing.peak_bytes, total_bytes=total)


def markdown(environment: dict, rows: list[dict]) -> str:
    lines = [
        "# Encoder, forward and backward",
        "",
        *(f"- {k}: {v}" for k, v in environment.items()),
    ]
    lines += [
        "",
        "Memory is beyond parameters and gradients; all: with them.",
        "",
        "| model | B, T, C, H, W | checkpoint_blocks | time | samples/s | memory | all |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        cells = [row["model"], ", ".join(map(str, row["shape"])), row["checkpoint_blocks"]]
        if row["seconds"]:
            median = row["seconds"]["median"]
            cells += [report.duration(median), f"{row['shape'][0] / median:.2f}"]
            sizes = row["peak_bytes"], row["total_bytes"]
            cells += ["" if x is None else f"{x / 2**30:.2f} GiB" for x in sizes]
        else:
            cells += [row["note"], "", "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/encoder_benchmark"))
    parser.add_argument("--model", default="timo_base")
    parser.add_argument("--dates", type=int, default=38 if cuda else 3)
    parser.add_argument("--size", type=int, default=512 if cuda else 224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--precision", default="bfloat16" if cuda else "float32")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds each")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    environment = harness.environment(device) | {"precision": options.precision}
    shape = options.batch, options.dates, options.bands, options.size, options.size
    dtype, rows = getattr(torch, options.precision), []
    for again in (True, False):
        rows.append(measure(options.model, shape, dtype, device, again, options.budget))
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_json(options.out / "encoder.json", {"environment": environment, "rows": rows})
        with report.atomic(options.out / "encoder.md") as partial:
            partial.write_text(markdown(environment, rows))
    print(markdown(environment, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
