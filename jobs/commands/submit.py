"""`ldm submit`: run a recipe as a job on a Ray cluster."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

import jobs
import ldm_core
import pipelines
from jobs.cluster_client import address_option, follow, submit_job
from jobs.commands.options import open_recipe, recipe_options, selection, selection_options
from jobs.console import console, emit_json, json_option
from pipelines.errors import MisuseError
from pipelines.run.plan import check, stages_of
from pipelines.run.recipe import Recipe, parse_recipe
from pipelines.secrets import without_secrets
from pipelines.store.storage import Storage
from pipelines.tracking import store


@click.command()
@recipe_options
@selection_options
@address_option
@click.option("--follow", "wait", is_flag=True, help="Print the job's log until it ends; exit as it did.")
@json_option
@click.pass_obj
def submit(
    debug: bool,
    recipe_name: str,
    root: str | None,
    overrides: tuple[str, ...],
    only: str | None,
    first: str | None,
    last: str | None,
    force: tuple[str, ...],
    address: str,
    wait: bool,
    as_json: bool,
) -> None:
    """Run a recipe as a job on a Ray cluster, as `ldm run` does on this machine.

    The resolved recipe and this code travel with the job. Sources and root must be reachable from the cluster: shared
    folders, or s3:// together with an MLflow server. The cluster's authentication token is taken from RAY_AUTH_TOKEN or
    ~/.ray/auth_token. Credentials do not travel: the cluster's own environment has them.

    \b
    Example:
      ldm submit small --address http://head:8265 --root s3://bucket/ldm \\
          --set pairs.source=s3://bucket/laion/*.parquet --set tracking.uri=http://mlflow:5000 --follow
    """
    recipe = open_recipe(recipe_name, root, overrides)
    chosen = selection(only, first, last, force)
    check(recipe, chosen)
    recipe = with_absolute_paths(recipe, address)
    if recipe.tracking.enabled:
        store(recipe.tracking, Storage(recipe.root), in_job=True)
    arguments = [f"--{option} {value}" for option, value in (("only", only), ("from", first), ("to", last)) if value]
    arguments += [f"--force {stage}" for stage in chosen.force]
    with tempfile.TemporaryDirectory(prefix="ldm-submit-") as folder:
        _pack(Path(folder), recipe.to_yaml())
        job_id = submit_job(
            address,
            entrypoint=" ".join(["python -m jobs.cli run recipe.yaml", *arguments]),
            runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}},
            metadata={"ldm.recipe": recipe.name, "ldm.root": recipe.root},
        )
    out = console(as_json)
    shown = without_secrets(address)
    out.print(f"submitted {job_id} to {shown}: `ldm logs {job_id}`, `ldm stop {job_id}`", markup=False)
    status = follow(address, job_id, out) if wait else "SUBMITTED"
    if as_json:
        emit_json({"job_id": job_id, "address": shown, "status": status})
    if status in ("FAILED", "STOPPED"):
        raise SystemExit(1)


def with_absolute_paths(recipe: Recipe, address: str) -> Recipe:
    """Return the recipe with the absolute path of every local file that it names: a job runs in a folder of its own.

    Raises:
        MisuseError: a relative root.
    """
    if "://" not in recipe.root and not Path(recipe.root).is_absolute():
        raise MisuseError(
            f"root {recipe.root} is relative: the cluster at {address} needs an absolute path that all its nodes "
            "share, or a URL: --root s3://…"
        )
    values = recipe.resolved()
    for section, fields in {
        "condition": recipe.condition.local_inputs,
        **{stage.name: stage.local_inputs for stage in stages_of(recipe)},
    }.items():
        for field in fields:
            *parents, name = field.split(".")
            for place in _places(values.get(section, {}), parents):
                if place.get(name) and "://" not in place[name]:
                    place[name] = str(Path(place[name]).expanduser().absolute())
    return parse_recipe(values)


def _places(place: Any, names: list[str]) -> list[dict[str, Any]]:
    """Return the mappings under some names; a number is a place in a list, and `*` stands for all of them."""
    places = [place]
    for name in names:
        if name == "*":
            places = [inner for each in places for inner in each]
        elif name.isdigit():
            places = [each[int(name)] for each in places if int(name) < len(each)]
        else:
            places = [each[name] for each in places if each.get(name)]
    return places


def _pack(folder: Path, recipe_yaml: str) -> None:
    """Fill the job's working directory: the recipe, and the three packages, so that the cluster runs the code that
    submitted it.
    """
    (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    for package in (ldm_core, pipelines, jobs):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
