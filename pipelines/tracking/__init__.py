"""Experiment tracking that never stops or slows the work: events go to disk, and a thread feeds MLflow."""

from pipelines.tracking.tracker import StageTracker, Tracker, null_stage_tracker, store

__all__ = ["StageTracker", "Tracker", "null_stage_tracker", "store"]
