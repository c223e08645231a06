"""Which column of a table is the picture, and which the text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.errors import UserError
from pipelines.pairs.config import Columns

# Names in use, most telling first; compared without regard to case.
URL_NAMES = ("url", "image_url", "img_url", "picture_url", "image_link", "photo_image_url")
TEXT_NAMES = (
    "text",
    "caption",
    "captions",
    "txt",
    "alt_text",
    "alttext",
    "alt",
    "top_caption",
    "description",
    "prompt",
)
IMAGE_NAMES = ("file_name", "image", "image_path", "file", "filename", "filepath", "path", "img", "picture", "jpg")


@dataclass(frozen=True)
class ResolvedColumns:
    """Columns of one table. Pictures are read from `image` where it is given, else downloaded from `url`."""

    text: str
    url: str | None
    image: str | None

    @property
    def used(self) -> set[str]:
        return {name for name in (self.text, self.url) if name}


def resolve_columns(
    where: str,
    names: list[str],
    wanted: Columns,
    first: dict[str, Any],
    exists: Callable[[str], bool],
) -> ResolvedColumns:
    """Find the columns of a table.

    Args:
        where: the table, for messages.
        names: its columns.
        wanted: what the recipe says; it wins.
        first: the first value of each column that is not null.
        exists: whether a relative path is a picture beside the table.

    Raises:
        UserError: a named column is not there, or none has a usual name; lists what is there.
    """
    text = _column(where, names, wanted.text, TEXT_NAMES, "text")
    image = _column(where, names, wanted.image, IMAGE_NAMES, "image")
    url = _column(where, names, wanted.url, URL_NAMES, "url")
    if wanted.image is None and image is not None:
        value = first.get(image)
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            url, image = url or image, None
        elif wanted.url or (url and isinstance(value, str) and not exists(value)):
            # A table of URLs may well say under which name a picture was once stored.
            image = None
    if text is None:
        raise UserError(_missing(where, names, "text", TEXT_NAMES))
    if url is None and image is None:
        raise UserError(_missing(where, names, "url", URL_NAMES) + " or `--set pairs.columns.image=NAME`")
    return ResolvedColumns(text=text, url=url, image=image)


def _column(where: str, names: list[str], wanted: str | None, usual: tuple[str, ...], role: str) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise UserError(
                f"{where} has no column {wanted!r} (pairs.columns.{role}): it has {', '.join(names)}; "
                f"say `--set pairs.columns.{role}=NAME`"
            )
        return wanted
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in usual if name in lowered), None)


def _missing(where: str, names: list[str], role: str, usual: tuple[str, ...]) -> str:
    return (
        f"{where} has no {role} column: it has {', '.join(names) or 'none'}, and none of the usual names "
        f"({', '.join(usual[:5])}, …); say `--set pairs.columns.{role}=NAME`"
    )
