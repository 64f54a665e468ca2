"""Functional ops: public functions, plain-PyTorch references, registration and dispatch."""

from timo.ops.dispatch import explain
from timo.ops.temporal_median import temporal_median

__all__ = ["explain", "temporal_median"]
