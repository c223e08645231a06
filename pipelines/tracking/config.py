"""What a recipe says about experiment tracking."""

from pipelines.config import Config, runtime


class TrackingConfig(Config):
    """Where runs are logged. Nothing here can change an artifact.

    Args:
        uri: an MLflow tracking URI; None for an SQLite store of the run's own, beside its artifacts.
        experiment: MLflow experiment.
        enabled: False logs nothing anywhere.
    """

    uri: str | None = runtime(None)
    experiment: str = runtime("ldm")
    enabled: bool = runtime(True)
