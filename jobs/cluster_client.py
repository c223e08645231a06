"""The commands' connection to a Ray cluster's job server."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from pipelines.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# The agent that starts jobs comes up some seconds after the server that accepts them.
AGENT_PATIENCE_S = 60.0
CHATTY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)

address_option: Callable[..., Any] = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    help="The cluster's dashboard, where jobs are submitted.",
)


def client(address: str) -> "JobSubmissionClient":
    """Connect to a cluster's job server.

    Raises:
        UserError: no server answers there, or it refuses the token.
    """
    # Ray takes a second to import, which the help of a command should not cost.
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        connection = JobSubmissionClient(address)
    except (ConnectionError, AuthenticationError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"no Ray cluster takes jobs at {address}: {reason}") from error
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    return connection


def submit_job(address: str, **job: Any) -> str:
    """Submit a job and return its id; wait a while for a cluster that has just started.

    Args:
        address: the cluster's dashboard.
        job: the arguments of `JobSubmissionClient.submit_job`.

    Raises:
        UserError: the cluster does not accept it.
    """
    connection = client(address)
    deadline = time.monotonic() + AGENT_PATIENCE_S
    while True:
        try:
            return connection.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"the Ray cluster at {address} does not take the job: {reason}") from error
        time.sleep(1)


def follow(address: str, job_id: str, out: Console) -> str:
    """Print a job's log while it runs; return its last status."""
    connection = client(address)

    async def tail() -> None:
        async for text in connection.tail_job_logs(job_id):
            out.print(text, end="", markup=False)

    try:
        asyncio.run(tail())
        return str(connection.get_job_status(job_id).value)
    except RuntimeError as error:
        raise UserError(f"job {job_id} at {address}: {' '.join(str(error).split())[:300]}") from error
