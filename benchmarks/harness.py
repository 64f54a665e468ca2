"""Timing, peak memory, measured rates and the environment of a benchmark run."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from timo.layers.linear import linear

ROOT = Path(__file__).resolve().parent.parent
MOST_CLOCK = 2e9  # cycles a second of a GPU, at most
WAIT = 0.5  # seconds: a call that takes longer is warmed up once and timed three times at least


@dataclass(frozen=True)
class Timing:
    """Seconds per call over repeated runs, and bytes allocated beyond what was there before."""

    median: float
    low: float  # first decile
    high: float  # ninth decile
    runs: int
    cpu: float | None = None  # CPU time of the calling thread; far below `median`: contention
    peak_bytes: int | None = None


def measure(call: Callable[[], object], device: torch.device, budget: float = 1.0) -> Timing:
    """Time `call` for about `budget` seconds, at least 3 runs, after warming up."""
    peak = _warm_up(call, device)
    (timing,) = _time([lambda _: call()], device, budget)
    return replace(timing, peak_bytes=peak)


def measure_training(
    forward: Callable[[], object],
    backward: Callable[[object], object],
    device: torch.device,
    budget: float = 1.0,
) -> tuple[Timing, Timing]:
    """Time `backward(forward())`: the backward pass alone, and both together.

    Every run has a forward pass of its own, so that a backward pass may free what was kept for it.
    """
    peak = _warm_up(lambda: backward(forward()), device)
    _, alone, both = _time([lambda _: forward(), backward], device, budget)
    return alone, replace(both, peak_bytes=peak)


def _warm_up(call, device: torch.device) -> int | None:
    """Run `call` once for its memory, and again unless it is slow."""
    started = time.perf_counter()
    peak = peak_memory(call, device)
    if time.perf_counter() - started < WAIT:
        call()
    return peak


def _time(steps: Sequence[Callable], device: torch.device, budget: float) -> list[Timing]:
    """Timing of every step, which gets the result of the one before; of several, also the sum."""
    clock = _gpu_clock() if device.type == "cuda" else _cpu_seconds
    runs: list[list[tuple[float, float]]] = []
    started = time.perf_counter()
    while True:
        runs.append(clock(steps))
        spent = time.perf_counter() - started
        least = 3 if spent > WAIT * len(runs) else 5
        if len(runs) >= least and (spent > budget or len(runs) == 500):
            break
    if len(steps) > 1:
        runs = [[*run, (sum(wall for wall, _ in run), sum(cpu for _, cpu in run))] for run in runs]
    samples = torch.tensor(runs, dtype=torch.float64)  # [runs, steps, (wall, CPU)]
    low, median, high = samples[..., 0].quantile(torch.tensor([0.1, 0.5, 0.9]).double(), 0).tolist()
    cpu = [None] * len(low) if device.type == "cuda" else samples[..., 1].quantile(0.5, 0).tolist()
    return [Timing(*timing[:3], len(runs), timing[3]) for timing in zip(median, low, high, cpu)]


def _cpu_seconds(steps) -> list[tuple[float, float]]:
    result, seconds = None, []
    for step in steps:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = step(result)
        seconds.append((time.perf_counter() - wall, time.thread_time() - cpu))
    return seconds


def _gpu_clock() -> Callable:
    """Times what the device does: it is kept waiting until the host has queued a whole run.

    The first run, before it is known how long that takes, includes the host's time.
    """
    lead = 0.0

    def seconds(steps) -> list[tuple[float, float]]:
        nonlocal lead
        result = None
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        torch.cuda._sleep(int(lead * MOST_CLOCK))
        started = time.perf_counter()
        events[0].record()
        for step, event in zip(steps, events[1:]):
            result = step(result)
            event.record()
        lead = min(2 * (time.perf_counter() - started), 0.05)
        events[-1].synchronize()
        return [(a.elapsed_time(b) / 1e3, 0.0) for a, b in zip(events, events[1:])]

    return seconds


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` allocates at most at a time; None where that cannot be measured.

    On CPUs the growth of the process, on Linux: with glibc told to map blocks of 64 KiB and more
    apart, freed ones go back to the system and cannot be taken again unseen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    marks = Path("/proc/self/clear_refs")
    if libc is None or not hasattr(libc, "mallopt") or not os.access(marks, os.W_OK):
        call()
        return None
    map_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(map_threshold, 2**16)
    libc.malloc_trim(0)
    try:
        marks.write_text("5")  # the high-water mark starts from here
        before = _kibibytes("/proc/self/status", "VmRSS")
        call()
        return max(0, _kibibytes("/proc/self/status", "VmHWM") - before) * 1024
    finally:
        # Where glibc's own rule ends: without the second, every freed block may go back.
        libc.mallopt(map_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)


def _kibibytes(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def available_memory(device: torch.device) -> float:
    """Bytes that a call could take; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if sys.platform != "linux":
        return float("inf")
    return _kibibytes("/proc/meminfo", "MemAvailable") * 1024


def copy_rate(device: torch.device, megabytes: int = 256, budget: float = 0.3) -> float:
    """Bytes read plus written per second by a plain copy larger than the caches."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (timing,) = _time([lambda _: target.copy_(source)], device, budget)
    return 2 * source.numel() / timing.median


def matmul_rate(device: torch.device, dtype: torch.dtype, budget: float = 0.3) -> float:
    """FLOP per second of a square matrix product, of two libraries' the faster one.

    For float32 on CPUs `timo.layers.linear` takes the library that is faster there.
    """
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    products = [lambda _: a @ a]
    if device.type == "cpu" and dtype == torch.float32:
        products.append(lambda _: linear(a, a, None))
    for product in products:
        product(None)
    least = min(_time([product], device, budget)[0].median for product in products)
    return 2 * n**3 / least


def environment(device: torch.device) -> dict:
    """What a figure depends on: machine, versions and commit."""
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"sm_{major}{minor}",
            "cuda": torch.version.cuda,
            "driver": driver.split("\n")[0] if driver else None,
        }
    else:
        record["device"] = torch.backends.cpu.get_cpu_capability()
    try:
        import triton
    except ImportError:
        return record
    return record | {"triton": triton.__version__}


def _commit() -> str | None:
    """Of the working tree; None in an installation, which may lie inside another repository."""
    if not (ROOT / "setup.py").exists():
        return None
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command) -> str | None:
    """What a command prints, without the end of the line; None if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def row(**columns) -> dict:
    """A result row; timings are flattened."""
    return {k: asdict(v) if isinstance(v, Timing) else v for k, v in columns.items()}
