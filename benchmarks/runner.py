"""Runs the implementations of an op side by side: parity first, then time, then comparison."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops.checks import dtype_name

from . import harness

DIRECTIONS = ("forward", "backward", "both")
# Root mean square of the errors of a result, relative to that of the exact result.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

Call = Callable[[], tuple[Tensor, ...]]


@dataclass
class Problem:
    """An op on inputs of one shape: what can run it, what it must give, what it costs at least."""

    calls: dict[str, Call]  # outputs, by implementation
    backends: tuple[str, ...]  # those of `calls` that are the op's own backends
    leaves: list[Tensor]  # what is differentiated; empty where the op has no gradient
    cotangents: list[Tensor]  # of the first outputs
    exact: Callable[[], tuple[list[Tensor], list[Tensor]]]  # outputs and gradients of leaves
    flop: dict[str, float]  # least products, by direction
    traffic: dict[str, float]  # least bytes read and written, by direction
    baseline: tuple[str, ...]  # what speed-ups refer to: the first of these that is right
    skipped: dict[str, str] = field(default_factory=dict)  # implementation: why it cannot run
    forward_only: dict[str, str] = field(default_factory=dict)  # implementation: why


def able(op: dispatch.Op, request: dispatch.Request) -> tuple[tuple[str, ...], dict[str, str]]:
    """Backends of an op that can run a request, and why each other cannot."""
    refusals = {name: backend.refusals(request) for name, backend in op.backends.items()}
    skipped = {name: "; ".join(why) for name, why in refusals.items() if why}
    return tuple(name for name in refusals if name not in skipped), skipped


def run(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    problem: Problem,
    *,
    names: Iterable[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
    budget: float = 1.0,
    deadline: float = float("inf"),
    notify: Callable[[str], None] = lambda name: None,
) -> Iterator[dict]:
    """Rows of one problem, one per implementation and direction.

    Args:
        names: implementations to run; all if None.
        budget: seconds of repetition per implementation and direction.
        deadline: on `time.monotonic()`; what has not begun by then is skipped.
        notify: called with every implementation's name before it runs.

    A row whose results are wrong, or that could not run, has no time, and `note` says why.
    """
    # Measured beside every problem: the machine may be shared, and a GPU's clock moves.
    matmul, copy = harness.matmul_rate(device, dtype), harness.copy_rate(device)
    exact = problem.exact()
    timings: dict[str, harness.Timing]
    wanted = [*problem.calls, *problem.skipped] if names is None else list(names)
    for name in wanted:
        if time.monotonic() > deadline:
            notes, timings = dict.fromkeys(directions, "the time for this run was over"), {}
        elif name in problem.skipped:
            notes, timings = dict.fromkeys(directions, problem.skipped[name]), {}
        else:
            notify(name)
            notes, timings = _run_one(problem, name, exact, device, dtype, directions, budget)
        for direction in directions:
            if direction != "forward" and not problem.leaves:
                continue
            flop, traffic = problem.flop[direction], problem.traffic[direction]
            floor = max(flop / matmul, traffic / copy)
            timing = timings.get(direction)
            seconds = timing.median if timing else math.nan
            yield harness.row(
                op=op, shape=list(shape), dtype=dtype_name(dtype), device=device.type, name=name,
                ours=name in problem.backends, baseline=list(problem.baseline),
                direction=direction, parity=timing is not None, note=notes.get(direction),
                seconds=timing, matmul_rate=matmul, copy_rate=copy, floor_seconds=floor,
                flop_rate=flop / seconds if timing else None,
                of_matmul=flop / seconds / matmul if timing else None,
                of_copy=traffic / seconds / copy if timing else None,
                of_floor=floor / seconds if timing else None,
            )  # fmt: skip


def _run_one(
    problem, name, exact, device, dtype, directions, budget
) -> tuple[dict[str, str], dict[str, harness.Timing]]:
    """Why a direction has no time, and the times of the others."""
    notes: dict[str, str] = {}
    timings: dict[str, harness.Timing] = {}
    forward = problem.calls[name]

    def backward(outputs):
        outputs = outputs[: len(problem.cotangents)]
        return torch.autograd.grad(
            outputs, problem.leaves, problem.cotangents, materialize_grads=True
        )

    try:
        with torch.no_grad():
            outputs = forward()
            wrong = disagreement(outputs, exact[0][: len(outputs)], dtype)
            del outputs
            if wrong:
                return dict.fromkeys(directions, f"wrong output: {wrong}"), {}
            if "forward" in directions:
                timings["forward"] = harness.measure(forward, device, budget)
        if not problem.leaves or set(directions) == {"forward"}:
            return notes, timings
        if name in problem.forward_only:
            return dict.fromkeys(("backward", "both"), problem.forward_only[name]), timings
        wrong = disagreement(backward(forward()), exact[1], dtype)
        if wrong:
            # Not the forward pass either: a speed-up is of an implementation that is right.
            return dict.fromkeys(directions, f"wrong gradient: {wrong}"), {}
        timings["backward"], timings["both"] = harness.measure_training(
            forward, backward, device, budget
        )
    except Exception as error:  # noqa: BLE001 - a compiler or a kernel of others may fail anyhow
        what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else _first_line(error)
        notes |= {d: what for d in directions if d not in timings}
    return notes, timings


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def disagreement(got: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """The first result that is not within the dtype's limit; None if all are.

    The error's root mean square may be `LIMITS[dtype]` of that of the exact result. Where the exact
    result is 0 throughout, the greatest of the others counts instead; integers must be equal.
    """
    norms = [_size(y) for y in exact if y.is_floating_point()]
    for i, (x, y) in enumerate(zip(got, exact)):
        if x.shape != y.shape:
            return f"number {i} has shape {tuple(x.shape)}, not {tuple(y.shape)}"
        if not y.is_floating_point():
            if not torch.equal(x, y):
                return f"number {i} differs in {(x != y).sum().item()} places"
            continue
        allowed = LIMITS[dtype] * (_size(y) or max(norms))
        error = _size(x.to(y.dtype) - y)
        if not error <= allowed:  # NaN is not
            return f"number {i}: error {error:.1e}, allowed {allowed:.1e}"
    return None


def _size(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def compare(rows: Sequence[dict]) -> list[dict]:
    """Rows with `speedup`: over the op's baseline and, for its backends, over the best other.

    Only between rows that have a time, which is to say that passed the gate, of the same op,
    shape, dtype and direction.
    """
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["op"], *row["shape"], row["dtype"], row["device"], row["direction"])
        groups.setdefault(key, {})[row["name"]] = row
    compared = []
    for group in groups.values():
        timed = {name: row for name, row in group.items() if row["seconds"]}
        others = [name for name, row in timed.items() if not row["ours"]]
        best = min(others, key=lambda name: timed[name]["seconds"]["median"], default=None)
        for name, row in group.items():
            base = next((b for b in row["baseline"] if b in timed), None)
            over = {}
            if name in timed and base:
                over["baseline"] = [base, _ratio(timed[base], row)]
            if name in timed and best and row["ours"]:
                over["best other"] = [best, _ratio(timed[best], row)]
            compared.append(row | {"speedup": over})
    return compared


def _ratio(base: dict, row: dict) -> float:
    return base["seconds"]["median"] / row["seconds"]["median"]
