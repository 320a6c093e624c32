"""The metrics of a validation, under the name that configs call them by."""

from lrm_pl.training.image_metrics import ImageMetricsLogger

__all__ = ["ImageMetricsLogger"]
