"""TiMo: kernel-accelerated foundation models for satellite image time series."""

from timo import layers, models, ops
from timo.models import create_model, load_checkpoint, save_checkpoint

__version__ = "0.1.0"
__all__ = ["create_model", "layers", "load_checkpoint", "models", "ops", "save_checkpoint"]
