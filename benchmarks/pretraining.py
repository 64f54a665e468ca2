"""Pretraining steps: the fast path against the dense published form, in one run.

Usage: python -m benchmarks.pretraining --out FOLDER [--models timo_tiny,timo_base] [--dates 3]
           [--batches 2,8] [--precision float32,bfloat16] [--compile] [--budget SECONDS]
Writes pretraining.json, pretraining.md and pretraining.png. A step goes from raw integers in the
host's memory to updated weights; implementations take turns. A form is compared only if its loss,
from the same weights and visible units in evaluation mode, is that of the dense form to rounding,
the compiled form's in training mode that of the fast form.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends.cudnn import conv  # type: ignore[attr-defined]

import timo
from timo.models import MaskedAutoencoder
from timo.models.masking import draw_units, visible_count
from timo.tasks.pretraining import reconstruct

from . import harness, report
from .dense_mae import DenseAutoencoder

SIZE, BANDS, RATIO = 224, 3, 0.75
OPTIONS: dict = {"stem_statistics": "all"}  # of the models, as the pretraining task has them
PHASES = ("data", "gather and stem", "encoder", "decoder", "loss", "optimiser")
DENSE, FUSED, FAST, COMPILED = "dense published", "dense, fused attention", "fast", "fast, compiled"
RATIOS = ("speedup", "passes_speedup", "cpu_speedup")  # over the dense form
ROUNDING = 1e-4  # of the loss, in float32
# Of the compiled form's loss, in the precision that is timed; GPUs may take tf32 for float32.
COMPILED_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def flops(model: MaskedAutoencoder, dates: int, keep: int) -> dict[str, int]:
    """Floating point operations of a training step for one sample, products alone, by phase.

    A product of (m, k) and (k, n) counts 2·m·k·n; its two gradients as much each. Frames need no
    gradient, so that the first convolution has only one.
    """
    encoder, decoder = model.encoder, model.decoder
    dims, units = encoder.embed_dims, dates * (SIZE // 32) ** 2
    bands = encoder.stem.conv.in_channels

    def blocks(tokens: int, dim: int, depth: int) -> int:
        # Query, key, value and output: 4 dim²; the hidden layer of 4 dim: 8 dim². Energies and
        # sums of values: 2·tokens²·dim each.
        return depth * (2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim)

    first = 2 * keep * 16**2 * 7 * 7 * bands * dims[0]
    stem = 2 * first + 3 * 2 * keep * 8**2 * 4 * dims[0] ** 2
    stages, forward = (encoder.stage1, encoder.stage2, encoder.stage3, encoder.stage4), 0
    for i, (stage, dim) in enumerate(zip(stages, dims)):
        tokens = keep * (8 >> i) ** 2
        forward += 2 * tokens * 9 * dims[i - 1] * dim if i else 0
        forward += blocks(tokens, dim, len(stage.blocks))
    dim, out = decoder.embed.out_features, decoder.pred.out_features
    decoded = 2 * keep * dims[-1] * dim + blocks(units, dim, len(decoder.blocks))
    decoded += 2 * (units - keep) * dim * out
    return {"gather and stem": stem, "encoder": 3 * forward, "decoder": 3 * decoded}


class Clock:
    """Marks between phases: wall time, or events in the stream of a GPU.

    Attributes:
        cpu: CPU time of the calling thread over the last step. Of one thread on a CPU, it is what
            the step costs where other programs compete for the cores.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.cpu = 0.0

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent in `phase`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:]):
            took = before.elapsed_time(after) / 1e3 if self.cuda else after - before
            spent[phase] = spent.get(phase, 0.0) + took
        self.marks = []
        return spent


class Bench:
    """One model, number of dates, batch and precision.

    Attributes:
        calls: loss of a batch on the device, by implementation.
    """

    def __init__(self, name, dates, batch, precision, device, compiled: bool):
        torch.manual_seed(0)
        self.device, self.precision = device, precision
        self.model = timo.create_model(name, "mae", BANDS, **OPTIONS).to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.05, fused=True
        )
        self._give_gradients()
        shape = (batch, dates, BANDS, SIZE, SIZE)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.host = frames.pin_memory() if device.type == "cuda" else frames
        self.grid = (dates, SIZE // 32, SIZE // 32)
        self.keep = visible_count(dates * (SIZE // 32) ** 2, RATIO)
        self.key = torch.arange(batch, device=device)
        self.scale = torch.full((BANDS,), 1 / 58.0, device=device)
        self.offset = torch.full((BANDS,), -2.0, device=device)
        self.calls: dict[str, Callable[[Tensor], Tensor]] = {
            DENSE: self._dense(fused=False),
            FUSED: self._dense(fused=True),
            FAST: self._fast(reconstruct),
        }
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            run = torch.compile(reconstruct, fullgraph=True, mode=mode)
            self.calls[COMPILED] = self._fast(run)
        self.clock = Clock(device)
        self._watch()

    def _fast(self, run: Callable) -> Callable[[Tensor], Tensor]:
        units = self.scale, self.offset, self.keep, "random"
        return lambda frames: run(self.model, frames, self.key, None, None, *units).loss

    def _dense(self, fused: bool) -> Callable[[Tensor], Tensor]:
        dense = DenseAutoencoder(self.model, fused)

        def loss(frames: Tensor) -> Tensor:
            image = frames.float() * self.scale[:, None, None] + self.offset[:, None, None]
            return dense(image, draw_units(self.key, self.grid, self.keep))

        return loss

    def _give_gradients(self) -> None:
        """Zeros where there is none: a CUDA graph would hold the first, and a peak count them."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _watch(self) -> None:
        """Mark where phases end, forward and backward, in the fast form as it is written."""

        def after(module, phase: str, next_back: str) -> None:
            def hook(module, inputs, output):
                if self.watching and output.requires_grad:
                    self.clock.mark(phase)
                    output.register_hook(lambda grad: self.clock.mark(next_back))

            module.register_forward_hook(hook)

        self.watching = False
        after(self.model.encoder.stem, "gather and stem", "encoder")
        after(self.model.encoder.stage4, "encoder", "decoder")
        after(self.model.decoder, "decoder", "loss")

    def autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def disagreement(self) -> dict[str, float]:
        """Relative difference of each form's loss from the dense one's, in evaluation mode.

        In float32 proper, for at most 8 samples: convolutions on GPUs would take tf32.
        """
        frames, key, kept = self.host[:8].to(self.device), self.key, conv.fp32_precision
        self.model.eval()
        self.key, conv.fp32_precision = key[:8], "ieee"
        try:
            with torch.no_grad():
                losses = {n: call(frames).item() for n, call in self.calls.items() if n != COMPILED}
        finally:
            self.key, conv.fp32_precision = key, kept
        self.model.train()
        return {n: abs(loss / losses[DENSE] - 1) for n, loss in losses.items()}

    def compiled_disagreement(self) -> float:
        """Relative difference of the compiled form's loss from the fast one's, as they are timed.

        Another mode, batch or precision would be compiled anew, and the graph of the steps with it.
        """
        frames, losses = self.host.to(self.device), {}
        for name in (FAST, COMPILED):
            with self.autocast():
                loss = self.calls[name](frames)
            losses[name] = loss.item()
            loss.backward()  # a CUDA graph waits for it
        self.optimizer.zero_grad(set_to_none=False)
        return abs(losses[COMPILED] / losses[FAST] - 1)

    def step(self, name: str, count: int = 1) -> dict[str, float]:
        """Seconds by phase of a training step, of `count` that do not wait for each other."""
        self.watching = name == FAST
        clock = self.clock
        started = time.thread_time()
        for _ in range(count):
            clock.mark("start")
            frames = self.host.to(self.device, non_blocking=True)
            clock.mark("data")
            with self.autocast():
                loss = self.calls[name](frames)
            clock.mark("loss")
            loss.backward()
            clock.mark("gather and stem")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=not clock.cuda)  # on CPUs as training does
            clock.mark("optimiser")
        clock.cpu = (time.thread_time() - started) / count
        return {phase: seconds / count for phase, seconds in clock.seconds().items()}

    def peak(self, name: str) -> int | None:
        """Bytes that forward and backward take beyond parameters and gradients."""
        self._give_gradients()

        def call() -> None:
            with self.autocast():
                loss = self.calls[name](self.host.to(self.device))
            loss.backward()

        return harness.peak_memory(call, self.device)

    def rows(self, budget: float, matmul: float) -> list[dict]:
        """A row for every implementation; all take turns, for about `budget` seconds each."""
        disagreement = self.disagreement()
        wrong = {n for n, d in disagreement.items() if not d <= ROUNDING}
        notes = {n: f"loss differs by {disagreement[n]:.1e}" for n in self.calls if n in wrong}
        names = [n for n in self.calls if n not in wrong and not (n == COMPILED and FAST in wrong)]
        peaks = {}
        for name in names:
            try:
                apart = self.compiled_disagreement() if name == COMPILED else 0.0
                if not apart <= COMPILED_ROUNDING[self.precision]:
                    wrong.add(name)
                    notes[name] = f"loss differs by {apart:.1e}"
                    continue
                self.step(name)
                peaks[name] = self.peak(name)
            except torch.OutOfMemoryError:
                notes[name] = "out of memory"
            if name in notes:  # outside of `except`, whose traceback holds what was allocated
                self.clock.seconds()  # drops the marks of half a step
                self.model.zero_grad()
                torch.cuda.empty_cache()
        names = list(peaks)
        runs: dict[str, list[dict]] = {name: [] for name in names}
        cpu: dict[str, list[float]] = {name: [] for name in names}
        started = time.perf_counter()
        while min(map(len, runs.values()), default=3) < 3 or (
            time.perf_counter() - started < budget * len(names)
        ):
            for name in names:
                runs[name].append(self.step(name, 4 if self.clock.cuda else 1))
                cpu[name].append(self.clock.cpu)
        counted = flops(self.model, self.grid[0], self.keep)
        batch = len(self.host)
        rows: list[dict[str, Any]] = [
            dict(name=n, parity=n not in wrong, note=x, seconds=None) for n, x in notes.items()
        ]
        for name in names:
            totals = torch.tensor([sum(run.values()) for run in runs[name]])
            low, median, high = totals.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            passes = torch.tensor([sum(run.values()) - run["optimiser"] for run in runs[name]])
            rows.append(
                dict(
                    name=name, parity=True, peak_bytes=peaks[name], samples=batch / median,
                    seconds={"median": median, "low": low, "high": high, "runs": len(totals)},
                    passes=passes.median().item(), cpu=torch.tensor(cpu[name]).median().item(),
                    phases=_medians(runs[name]) if name == FAST else None,
                    of_matmul=sum(counted.values()) * batch / median / matmul
                    if name in (FAST, COMPILED) else None,
                )
            )  # fmt: skip
        base: dict = next((row for row in rows if row["name"] == DENSE and row["seconds"]), {})
        for row in rows:
            timed = base and row["seconds"]
            row["speedup"] = base["seconds"]["median"] / row["seconds"]["median"] if timed else None
            row["passes_speedup"] = base["passes"] / row["passes"] if timed else None
            row["cpu_speedup"] = base["cpu"] / row["cpu"] if timed else None
        problem = dict(
            model=self.model.config["name"], dates=self.grid[0], batch=batch, flop=counted,
            precision=str(self.precision).removeprefix("torch."), matmul_rate=matmul,
        )  # fmt: skip
        return [problem | row for row in rows]


def _medians(runs: list[dict]) -> dict[str, float]:
    return {p: torch.tensor([r.get(p, 0.0) for r in runs]).median().item() for p in PHASES}


def markdown(environment: dict, rows: list[dict]) -> str:
    """All rows, the fast form's time by phase, and counted FLOPs."""
    lines = ["# Pretraining steps", "", *(f"- {k}: {v}" for k, v in environment.items()), ""]
    lines += [
        f"{SIZE}×{SIZE} pixels, {BANDS} bands, {RATIO:.0%} of the units hidden. Peak memory is "
        "beyond parameters and gradients; of matmul: counted FLOP/s over those of a square "
        "product in the same run.",
        "",
        "| model | dates | batch | precision | form | step | samples/s | over dense | "
        "over dense, forward and backward | over dense, CPU time | peak memory | of matmul |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        key = [row["model"], row["dates"], row["batch"], row["precision"], row["name"]]
        if row["seconds"] is None:
            cells = [row["note"], *6 * [""]]
        else:
            peak = row["peak_bytes"]
            cells = [
                report.duration(row["seconds"]["median"]), f"{row['samples']:.2f}",
                *(f"{row[k]:.2f}" if row["speedup"] else "" for k in RATIOS),
                "" if peak is None else f"{peak / 2**20:.0f} MiB",
                f"{row['of_matmul']:.0%}" if row["of_matmul"] else "",
            ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, key + cells))} |")
    lines += ["", "Where the fast form's time goes, forward and backward:", ""]
    lines += [f"| model | dates | batch | precision | {' | '.join(PHASES)} |", "|" + "---|" * 10]
    for row in (r for r in rows if r.get("phases")):
        key = [row["model"], row["dates"], row["batch"], row["precision"]]
        total = sum(row["phases"].values())
        shares = [f"{row['phases'][p] / total:.1%}" for p in PHASES]
        lines.append(f"| {' | '.join(map(str, key + shares))} |")
    lines += ["", "Counted GFLOP of a step for one sample:", ""]
    for model, dates in dict.fromkeys((r["model"], r["dates"]) for r in rows):
        counted = next(r["flop"] for r in rows if (r["model"], r["dates"]) == (model, dates))
        parts = ", ".join(f"{phase} {n / 1e9:.1f}" for phase, n in counted.items())
        lines.append(f"- {model}, {dates} dates: {sum(counted.values()) / 1e9:.1f} ({parts})")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[dict]) -> None:
    """Samples per second over the batch, a panel for every model, number of dates, precision."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["seconds"]]
    panels = list(dict.fromkeys((r["model"], r["dates"], r["precision"]) for r in timed))
    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in (DENSE, FUSED, FAST, COMPILED):
            points = [
                (r["batch"], r["samples"])
                for r in timed
                if (r["model"], r["dates"], r["precision"], r["name"]) == (*key, name)
            ]
            if points:
                axis.plot(*zip(*sorted(points)), "o-", label=name)
        axis.set_title(f"{key[0]}, {key[1]} dates, {key[2]}", fontsize=9)
        axis.set(xlabel="batch", ylabel="samples/s")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    with report.atomic(path) as partial:
        figure.savefig(partial, dpi=100)


def write(folder: Path, environment: dict, rows: list[dict]) -> None:
    """pretraining.json, pretraining.md and pretraining.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / "pretraining.json", {"environment": environment, "rows": rows})
    with report.atomic(folder / "pretraining.md") as partial:
        partial.write_text(markdown(environment, rows))
    if any(row["seconds"] for row in rows):
        plot(folder / "pretraining.png", rows)


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining_benchmark"))
    parser.add_argument("--models", default="timo_tiny,timo_base")
    parser.add_argument("--dates", default="3")
    parser.add_argument("--batches", default="16,64,128,256" if cuda else "2,8")
    parser.add_argument("--precision", default="bfloat16" if cuda else "float32")
    parser.add_argument("--compile", action="store_true", help="the compiled fast form too")
    parser.add_argument("--budget", type=float, default=2.0 if cuda else 10.0, help="seconds each")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    environment, rows = harness.environment(device), []
    for precision in options.precision.split(","):
        dtype = getattr(torch, precision)
        matmul = harness.matmul_rate(device, dtype)
        for name in options.models.split(","):
            for dates in map(int, options.dates.split(",")):
                for batch in map(int, options.batches.split(",")):
                    torch.compiler.reset()
                    try:
                        bench = Bench(name, dates, batch, dtype, device, options.compile)
                        added = bench.rows(options.budget, matmul)
                    except torch.OutOfMemoryError:
                        print(f"{name}, {dates} dates, batch {batch}: out of memory", flush=True)
                        break
                    rows += added
                    for row in added:
                        done = f"{row['samples']:.2f} samples/s" if row["seconds"] else row["note"]
                        print(f"{name}, {dates} dates, batch {batch}, {precision}, "
                              f"{row['name']}: {done}", flush=True)  # fmt: skip
                    write(options.out, environment, rows)
    return 1 if any(not row["parity"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
