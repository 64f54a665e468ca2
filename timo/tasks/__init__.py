"""Training, evaluation and prediction with Lightning (`pip install timo[train]`)."""

from timo.tasks.classification import ClassificationTask
from timo.tasks.data import SeriesData
from timo.tasks.maps import embed_map
from timo.tasks.prediction import load_run, load_segmenter, load_task, predict_series
from timo.tasks.pretraining import PretrainingTask
from timo.tasks.segmentation import SegmentationTask
from timo.tasks.tables import embed_series, predict_classes

__all__ = [
    "ClassificationTask",
    "PretrainingTask",
    "SegmentationTask",
    "SeriesData",
    "embed_map",
    "embed_series",
    "load_run",
    "load_segmenter",
    "load_task",
    "predict_classes",
    "predict_series",
]
