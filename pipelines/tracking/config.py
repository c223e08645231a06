"""The `tracking` section of a recipe."""

from pipelines.config import Config, runtime


class TrackingConfig(Config):
    """MLflow settings. They never change an artifact.

    Args:
        uri: an MLflow tracking URI without a password; None takes MLFLOW_TRACKING_URI from the environment, or else an
            SQLite store beside the run's artifacts (of a remote root: in a folder of the user, below LDM_HOME).
        experiment: name of the MLflow experiment.
        enabled: false logs nothing anywhere.
    """

    uri: str | None = runtime(None)
    experiment: str = runtime("ldm")
    enabled: bool = runtime(True)
