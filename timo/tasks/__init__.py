"""Training, evaluation and prediction with Lightning (`pip install timo[train]`)."""

from timo.tasks.data import SeriesData
from timo.tasks.prediction import load_segmenter, predict_series
from timo.tasks.pretraining import PretrainingTask
from timo.tasks.segmentation import SegmentationTask

__all__ = [
    "PretrainingTask",
    "SegmentationTask",
    "SeriesData",
    "load_segmenter",
    "predict_series",
]
