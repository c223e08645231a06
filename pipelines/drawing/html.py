"""HTML from the Jinja templates that lie beside the code: the report's page, and a section for each stage."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.drawing.formatting import format_bytes, format_count, format_seconds
from pipelines.drawing.printable import printable

PACKAGE = Path(__file__).parents[1]


def render(template: str, **values: Any) -> Markup:
    """Render a template, given by its path below `pipelines/`; every value is escaped unless it is Markup."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "size": format_bytes,
        "duration": format_seconds,
        "count": format_count,
        "printable": printable,
    }
    return environment
