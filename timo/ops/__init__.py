"""Functional ops: public functions, plain-PyTorch references, registration and dispatch."""

from timo.ops.dispatch import explain
from timo.ops.gather_units import gather_units
from timo.ops.gyroscope_attention import gyroscope_attention
from timo.ops.masked_pixel_loss import masked_pixel_loss
from timo.ops.median_deviation import median_deviation
from timo.ops.scatter_units import scatter_units
from timo.ops.temporal_maximum import temporal_maximum
from timo.ops.temporal_median import temporal_median

__all__ = [
    "explain",
    "gather_units",
    "gyroscope_attention",
    "masked_pixel_loss",
    "median_deviation",
    "scatter_units",
    "temporal_maximum",
    "temporal_median",
]
