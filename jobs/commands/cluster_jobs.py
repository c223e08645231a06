"""`ldm jobs`, `ldm logs`, `ldm stop`: list, follow and stop the jobs of a Ray cluster."""

import time

import click
from rich.table import Table

from jobs.cluster_client import address_option, client, follow
from jobs.console import console, emit_json, json_option
from pipelines.drawing.formatting import format_seconds
from pipelines.errors import UserError


@click.command()
@address_option
@json_option
def jobs(address: str, as_json: bool) -> None:
    """List the jobs of a Ray cluster, newest first.

    \b
    Example:
      ldm jobs --address http://head:8265
    """
    found = sorted(client(address).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("job", "status", "recipe", "time"):
        table.add_column(heading)
    rows = []
    for job in found:
        seconds = ((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 1000
        recipe = (job.metadata or {}).get("ldm.recipe", "")
        rows.append({"job_id": job.submission_id, "status": job.status.value, "recipe": recipe, "seconds": seconds})
        table.add_row(job.submission_id, job.status.value, recipe, format_seconds(seconds))
    console(as_json).print(table)
    if as_json:
        emit_json({"jobs": rows})


@click.command()
@click.argument("job_id")
@address_option
@click.option("--follow", "wait", is_flag=True, help="Keep printing until the job ends.")
def logs(job_id: str, address: str, wait: bool) -> None:
    """Print the output of a job.

    \b
    Example:
      ldm logs raysubmit_abc --follow
    """
    out = console()
    if wait:
        follow(address, job_id, out)
        return
    try:
        out.print(client(address).get_job_logs(job_id), end="", markup=False)
    except RuntimeError as error:
        raise _unknown(job_id, address, error) from error


@click.command()
@click.argument("job_id")
@address_option
def stop(job_id: str, address: str) -> None:
    """Stop a job. Submitted again, it continues where it was.

    \b
    Example:
      ldm stop raysubmit_abc
    """
    try:
        stopped = client(address).stop_job(job_id)
    except RuntimeError as error:
        raise _unknown(job_id, address, error) from error
    console().print(f"{job_id} {'is stopping' if stopped else 'had already ended'}", markup=False)


def _unknown(job_id: str, address: str, error: Exception) -> UserError:
    return UserError(f"no job {job_id} at {address} ({' '.join(str(error).split())[:200]}): `ldm jobs` lists them")
