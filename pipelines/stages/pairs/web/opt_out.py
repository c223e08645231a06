"""`X-Robots-Tag`: the header by which a server forbids machines to use its pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Directives of the form `unavailable_after: DATE`.
_WITH_VALUE = frozenset({"unavailable_after", "max_snippet", "max_image_preview", "max_video_preview"})


def opts_out(headers: Iterable[str], directives: Collection[str], user_agent: str) -> bool:
    """Tell whether one of these headers forbids what we do.

    A header is a list of directives (`noai, noimageai`). In `otherbot: noai` they are meant for that robot alone, and
    count for us only if it is the product that our user agent names.

    Args:
        headers: the values of all `X-Robots-Tag` headers of an answer.
        directives: the directives that we respect, in lower case.
        user_agent: our user agent, such as `ldm-pipelines/0.1`.
    """
    product = user_agent.partition("/")[0].strip().lower()
    for header in headers:
        robot = ""
        for part in header.lower().split(","):
            before, colon, after = part.partition(":")
            # A colon also separates a directive from its value.
            if colon and before.strip().replace("-", "_") not in _WITH_VALUE:
                robot, part = before.strip(), after
            if robot in ("", "*", product) and part.strip() in directives:
                return True
    return False
