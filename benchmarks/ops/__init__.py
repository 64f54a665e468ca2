"""The registry: one module per op, of the op's name.

A module states `LAYOUT`, the names of a shape's sizes; `SHAPES` and `CPU_SHAPES`, the table's
shapes, most telling first; and `problem(shape, dtype, device)`, a `benchmarks.runner.Problem`.
"""

from importlib import import_module
from types import ModuleType

OPS = (
    "gyroscope_attention", "temporal_median", "median_deviation", "gather_units",
    "masked_pixel_loss", "scatter_units", "temporal_maximum",
)  # fmt: skip


def load(op: str) -> ModuleType:
    """The module of an op's benchmark."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(OPS)}")
    return import_module(f"{__name__}.{op}")
