"""TiMo: kernel-accelerated foundation models for satellite image time series."""

from timo import ops

__version__ = "0.1.0"
__all__ = ["ops"]
