"""Experiment tracking that never stops or slows the work: events go to disk, and a thread sends them to MLflow.

Read `tracker` (what the pipeline calls), `places` (where things are), `spool` (the queue on disk), then `sender` (the
thread).
"""

from pipelines.tracking.places import home, spool_folder, store
from pipelines.tracking.tracker import StageTracker, Tracker, null_stage_tracker

__all__ = ["StageTracker", "Tracker", "home", "null_stage_tracker", "spool_folder", "store"]
