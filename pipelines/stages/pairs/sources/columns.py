"""Find the columns of a table: the picture's, the text's, and the one that a filter's name means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import UserError
from pipelines.stages.pairs.config import Columns

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
IMAGE_NAMES = (
    "file_name",
    "image",
    "image_path",
    "file",
    "filename",
    "filepath",
    "path",
    "img",
    "picture",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
)

# The names of LAION's columns, which recipes say, and what other data sets call the same; most alike first.
ALIASES = {
    "similarity": (
        "clip_similarity_vitl14",
        "clip_l14_similarity_score",
        "clip_similarity_vitb32",
        "clip_b32_similarity_score",
        "clip_similarity",
    ),
    "punsafe": ("nsfw_score_opennsfw2", "nsfw_score_gantman", "nsfw_score"),
    "pwatermark": ("watermark_score",),
    "aesthetic": ("aesthetic_score_laion_v2", "aesthetic_score", "aesthetics_score", "aesthetics"),
    "language": ("lang",),
    "nsfw": ("nsfw_tag", "nsfw_label"),
}


@dataclass(frozen=True)
class ResolvedColumns:
    """Columns of one table. Pictures are read from `image` if it is given, else downloaded from `url`."""

    text: str | None
    url: str | None
    image: str | None

    @property
    def used(self) -> set[str]:
        return {name for name in (self.text, self.url) if name}


def resolve_columns(
    where: str,
    names: Sequence[str],
    wanted: Columns,
    first: dict[str, Any],
    exists: Callable[[str], bool],
    *,
    needs_text: bool = True,
) -> ResolvedColumns:
    """Find the columns of a table.

    Args:
        where: the table, for messages.
        names: its columns.
        wanted: what the recipe says; it wins.
        first: the first value of each column that is not null.
        exists: whether a relative path is a picture beside the table.
        needs_text: whether a table without captions is refused.

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
            # A table of URLs may well say under which name a picture was once stored; no such file is here.
            image = None
    if text is None and needs_text:
        raise UserError(
            _missing(where, names, "text", TEXT_NAMES) + ", or `--set pairs.captions=optional` if none are needed"
        )
    if url is None and image is None:
        raise UserError(_missing(where, names, "url", URL_NAMES) + " or `--set pairs.columns.image=NAME`")
    return ResolvedColumns(text=text, url=url, image=image)


def find_column(names: Iterable[str], wanted: str) -> str | None:
    """Return the column that a name means, without regard to case: the one of that name, else what others call it.

    A column that was renamed to make way for one of a shard's own is also found by the name it had.
    """
    lowered = _lowered(names)
    name = wanted.lower()
    return next((lowered[n] for n in (name, f"source_{name}", *ALIASES.get(name, ())) if n in lowered), None)


def first_of(names: Iterable[str], usual: tuple[str, ...]) -> str | None:
    """Return the first of the usual names that is among these, as it is written there."""
    lowered = _lowered(names)
    return next((lowered[name] for name in usual if name in lowered), None)


def headless_names(cells: list[str]) -> list[str] | None:
    """Name the columns of a table without a header (its first line has a URL); return None if there is a header.

    Of two columns the other one is the caption (CC3M, CC12M); others are `column_1`… by their place from 0.
    """
    urls = [cell.strip().lower().startswith(("http://", "https://")) for cell in cells]
    if not any(urls):
        return None
    if len(cells) == 2 and sum(urls) == 1:
        return ["url" if is_url else "caption" for is_url in urls]
    first = urls.index(True)
    return ["url" if i == first else f"column_{i}" for i in range(len(cells))]


def _lowered(names: Iterable[str]) -> dict[str, str]:
    lowered: dict[str, str] = {}
    for name in names:
        lowered.setdefault(name.lower(), name)
    return lowered


def _column(where: str, names: Sequence[str], wanted: str | None, usual: tuple[str, ...], role: str) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise UserError(
                f"{where} has no column {wanted!r} (pairs.columns.{role}): it has {', '.join(names)}; "
                f"say `--set pairs.columns.{role}=NAME`"
            )
        return wanted
    return first_of(names, usual)


def _missing(where: str, names: Sequence[str], role: str, usual: tuple[str, ...]) -> str:
    return (
        f"{where} has no {role} column: it has {', '.join(names) or 'none'}, and none of the usual names "
        f"({', '.join(usual[:5])}, …); say `--set pairs.columns.{role}=NAME`"
    )
