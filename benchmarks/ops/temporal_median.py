"""temporal_median: backends against torch.median and a sort, with the copy floor.

Floor: x is read once, values and int64 indices are written once.
"""

from collections.abc import Iterator
from functools import partial

import torch

from timo import ops
from timo.ops.temporal_median import FORWARD

from .. import harness

# (B, T, N, H, D): queries of base stages 1 and 2 at 224 x 224.
SHAPES = [(8, 3, 3136, 4, 32), (8, 10, 3136, 4, 32), (8, 38, 784, 8, 32)]


def rows(device: torch.device) -> Iterator[dict]:
    """One row per shape, dtype and implementation; a backend is timed only if it is right."""
    rate = harness.copy_rate(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for B, T, N, H, D in SHAPES:
        if device.type == "cpu":
            B = 1
        x = torch.randn(B, T, N, H, D, device=device).to(dtype)
        expected = ops.temporal_median(x, backend="reference")
        channels = B * N * H * D
        floor = (channels * (T + 1) * x.element_size() + channels * 8) / rate
        calls = {
            name: partial(ops.temporal_median, x, backend=name)
            for name in FORWARD.backends
            if not FORWARD.backends[name].refusals(FORWARD.request(x))
        }
        parity = {name: all(map(torch.equal, call(), expected)) for name, call in calls.items()}
        calls["torch.median"] = partial(x.median, 1)
        for name, call in calls.items():
            green = parity.get(name, True)
            timing = harness.measure(call, device) if green else None
            yield harness.row(
                op="temporal_median", shape=[B, T, N, H, D], dtype=str(dtype), name=name,
                parity=green, seconds=timing, floor_seconds=floor,
                of_floor=floor / timing.median if timing else None,
            )  # fmt: skip
