"""The `tracking` section of a recipe."""

from pipelines.config import Config, runtime


class TrackingConfig(Config):
    """The MLflow server, or store, that runs are logged to. Nothing here can change an artifact.

    Args:
        uri: an MLflow tracking URI; None takes an SQLite store beside the run's artifacts.
        experiment: name of the MLflow experiment.
        enabled: false logs nothing anywhere.
    """

    uri: str | None = runtime(None)
    experiment: str = runtime("ldm")
    enabled: bool = runtime(True)
