"""The `autoencoder` stage's section of the report."""

from pipelines.drawing.formatting import format_count
from pipelines.drawing.html import render
from pipelines.drawing.sections import facts, loss_chart_of, picture, previews, rate
from pipelines.stage import Headline, Section
from pipelines.stages.autoencoder.artifact import RECONSTRUCTIONS
from pipelines.store.ledger import Artifact


def section(artifact: Artifact) -> Section:
    """Return facts, the loss, and pictures above their reconstructions.

    What an import was measured on may be other pairs than the run's: it is named, and no headline.
    """
    details = artifact.details
    check = details.get("import_check")
    headlines: tuple[Headline, ...] = ()
    if "psnr_db" in details:
        headlines = (Headline(f"{details['psnr_db']:.1f} dB", "reconstruction PSNR", "of the first stage"),)
    html = render(
        "stages/autoencoder/section.html.j2",
        facts=facts(
            ("Parameters", format_count(details.get("parameters"))),
            ("PSNR", f"{details['psnr_db']:.2f} dB" if "psnr_db" in details else None),
            ("PSNR when imported", f"{check['psnr_db']:.2f} dB on pairs {check['pairs']}" if check else None),
            ("Steps", format_count(details.get("steps"))),
            ("Throughput", rate(details)),
            ("Weights", details.get("encoder_sha256", "")[:16]),
        ),
        loss=loss_chart_of(artifact),
        reconstructions=picture(artifact, RECONSTRUCTIONS),
        previews=previews(artifact),
        imported=bool(check),
    )
    return Section(html, headlines)
