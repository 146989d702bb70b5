"""Prometheus numbers of an engine."""

from .engine_metrics import BooksSample, EngineMetrics, FinishedSample, FirstTokenSample, StepSample

__all__ = ["BooksSample", "EngineMetrics", "FinishedSample", "FirstTokenSample", "StepSample"]
