"""Streamed metrics and confidence intervals: memory does not grow with the split."""

from groundup.metrics.classification import ClassificationMetrics, MultiLabelMetrics
from groundup.metrics.language import LanguageMetrics, PreferenceMetrics, SummedMetrics
from groundup.metrics.regression import RegressionMetrics
from groundup.metrics.streamed import MetricSet

__all__ = ["ClassificationMetrics", "LanguageMetrics", "MetricSet", "MultiLabelMetrics", "PreferenceMetrics", "RegressionMetrics", "SummedMetrics"]
