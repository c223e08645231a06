"""Where MLflow's store of a root is, and where events wait that are not sent yet."""

import hashlib
import os
from pathlib import Path

from pipelines.errors import MisuseError
from pipelines.store.home import home as user_home
from pipelines.store.storage import Storage
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.database import SQLITE

# MLflow's own variable: the one way to name a server whose URI holds a password.
URI_VARIABLE = "MLFLOW_TRACKING_URI"
# Ray sets it for the driver of a submitted job.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def home(root: Storage) -> Path:
    """Return the local folder for what belongs to a root but cannot lie in a bucket: MLflow's database and the spool.

    The root itself if it is local; otherwise a folder of this user, `$LDM_HOME/NAME-DIGEST`, that the next run on this
    machine finds again.
    """
    if root.is_local:
        return Path(root.path())
    url = root.url.rstrip("/")
    return user_home() / f"{root.name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def spool_folder(root: Storage) -> Path:
    """Return the folder for events that are not sent yet; shared by all runs of this machine on this root."""
    return home(root) / ".tracking"


def store(config: TrackingConfig, root: Storage, *, in_job: bool | None = None) -> tuple[str, str | None]:
    """Return the tracking URI, and where a new experiment's artifacts go (None: the server decides).

    Args:
        config: its `uri` comes first, then MLFLOW_TRACKING_URI, then an SQLite store in the root's `home`.
        root: the root of the run.
        in_job: whether the run is a submitted job; None finds out.

    Returns:
        The URI may hold a password, which may be shown to nobody: `without_secrets` hides it.

    Raises:
        MisuseError: the store would lie on a node of a cluster and be lost with the job.
    """
    uri = config.uri or os.environ.get(URI_VARIABLE)
    if not uri:
        if not root.is_local and (JOB_VARIABLE in os.environ if in_job is None else in_job):
            raise MisuseError(
                f"a job with the root {root.url} needs an MLflow server, for what it keeps on a node is lost with the "
                f"job: set tracking.uri, or {URI_VARIABLE} here and on the cluster, or tracking.enabled=false"
            )
        uri = f"{SQLITE}{home(root)}/mlflow.db"
    if not uri.startswith(SQLITE):
        return uri, None
    database = Path(uri.removeprefix(SQLITE)).absolute()
    return f"{SQLITE}{database}", (database.parent / "mlartifacts").as_uri()
