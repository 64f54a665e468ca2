"""Training, evaluation and prediction with Lightning (`pip install timo[train]`)."""

from timo.tasks.classification import ClassificationTask
from timo.tasks.data import SeriesData
from timo.tasks.prediction import load_segmenter, load_task, predict_series
from timo.tasks.pretraining import PretrainingTask
from timo.tasks.segmentation import SegmentationTask

__all__ = [
    "ClassificationTask",
    "PretrainingTask",
    "SegmentationTask",
    "SeriesData",
    "load_segmenter",
    "load_task",
    "predict_series",
]
