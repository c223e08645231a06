"""`ldm verify`: check that artifacts and shards are whole and true."""

import dataclasses

import click

from jobs.console import console, emit_json, json_option
from pipelines.drawing.formatting import format_bytes
from pipelines.errors import UserError
from pipelines.inspection.verify import SAMPLES, verify_path


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--reencode",
    type=click.IntRange(min=0),
    default=SAMPLES,
    metavar="K",
    show_default=True,
    help="Samples of each artifact of latents to decode and to encode again; 0 looks at files alone.",
)
@json_option
def verify(paths: tuple[str, ...], reencode: int, as_json: bool) -> None:
    """Check that an artifact, a shard (.tar) or every finished artifact of a root is whole and true.

    Reads everything: sizes and digests against the manifest, tars to their end, arrays and their shapes. Of latents, K
    samples are decoded and encoded again, and held against the cache and the pictures, if pairs and autoencoder are
    still under the root.

    \b
    Example:
      ldm verify runs/demo
      ldm verify runs/demo/latents/*/000000.tar
    """
    reports = [report for path in paths for report in verify_path(path, samples=reencode)]
    out = console(as_json)
    for report in reports:
        verdict = "whole" if report.ok else "DAMAGED"
        facts = f"{report.files} files, {report.rows:,} rows, {format_bytes(report.bytes)}"
        out.print(f"{verdict:<8} {report.url}  {facts}", markup=False)
        for problem in report.problems:
            out.print(f"         {problem}", markup=False)
        for note in report.notes:
            out.print(f"         {note}", markup=False)
    damaged = [report for report in reports if not report.ok]
    if as_json:
        emit_json({"ok": not damaged, "artifacts": [dataclasses.asdict(report) for report in reports]})
    if damaged:
        raise UserError(f"{len(damaged)} of {len(reports)} damaged: `ldm run RECIPE --force STAGE` rebuilds a stage")
