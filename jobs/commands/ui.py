"""`ldm ui`: serve a root's experiments with MLflow."""

import os
import socket
import subprocess
import sys

import click

from jobs.console import console
from pipelines.errors import UserError
from pipelines.store.storage import Storage
from pipelines.tracking import home


@click.command()
@click.argument("root", default="runs/demo")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
def ui(root: str, host: str, port: int) -> None:
    """Serve a root's experiments: start the MLflow server on its embedded store.

    The store of a remote root is on the machine that ran the recipe, for its user.

    \b
    Example:
      ldm ui runs/demo --port 5001
    """
    storage = Storage(root)
    database = home(storage) / "mlflow.db"
    if not database.is_file():
        advice = "run a recipe with this root first"
        if not storage.is_local:
            advice = "look on the machine that ran the recipe, or at the MLflow server that it named"
        raise UserError(f"no experiments under {root}: {database} is missing; {advice}")
    _check_free(host, port)
    console().print(f"MLflow on http://{host}:{port} (Ctrl-C to stop)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--default-artifact-root", (database.parent / "mlartifacts").as_uri()]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    raise SystemExit(subprocess.call(command))


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port"
            ) from error
