"""Models: encoder, masked autoencoder, classification, segmentation, checkpoints."""

from timo.models.checkpoint import (
    LoadReport,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
)
from timo.models.classifier import Classifier
from timo.models.create import create_model
from timo.models.encoder import Encoder
from timo.models.mae import MAEOutput, MaskedAutoencoder
from timo.models.segmenter import Segmenter

__all__ = [
    "Classifier",
    "Encoder",
    "LoadReport",
    "MAEOutput",
    "MaskedAutoencoder",
    "Segmenter",
    "create_model",
    "load_checkpoint",
    "model_from_checkpoint",
    "save_checkpoint",
]
