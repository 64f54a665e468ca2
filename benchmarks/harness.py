"""Timing, peak memory, measured floors and the environment of a benchmark run."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds per call over repeated runs, and bytes allocated beyond the inputs (GPU only)."""

    median: float
    low: float  # first decile
    high: float  # ninth decile
    runs: int
    peak_bytes: int | None


def measure(call: Callable[[], object], device: torch.device, budget: float = 1.0) -> Timing:
    """Time `call` for about `budget` seconds, at least 5 runs, after warming up."""
    call()
    call()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < 5 or (time.perf_counter() - started < budget and len(seconds) < 500):
        seconds.append(_time_on_gpu(call) if cuda else _time_on_cpu(call))
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    low, median, high = torch.tensor(seconds).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return Timing(median, low, high, len(seconds), peak)


def _time_on_cpu(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _time_on_gpu(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_rate(device: torch.device, megabytes: int = 256) -> float:
    """Bytes read plus written per second by a plain copy larger than the caches."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device).median


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / measure(lambda: a @ a, device).median


def environment(device: torch.device) -> dict:
    """What a figure depends on: machine, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        record |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"sm_{major}{minor}",
            "cuda": torch.version.cuda,
        }
    else:
        record["device"] = torch.backends.cpu.get_cpu_capability()
    try:
        import triton
    except ImportError:
        return record
    return record | {"triton": triton.__version__}


def row(**columns) -> dict:
    """A result row; timings are flattened."""
    return {k: asdict(v) if isinstance(v, Timing) else v for k, v in columns.items()}
