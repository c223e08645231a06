"""Experiment tracking that never stops or slows the work: events go to disk, and a thread sends them to MLflow.

Read `tracker` (what the pipeline calls), `spool` (the queue on disk), then `sender` (the thread).
"""

from pipelines.tracking.tracker import StageTracker, Tracker, null_stage_tracker, store

__all__ = ["StageTracker", "Tracker", "null_stage_tracker", "store"]
