"""`X-Robots-Tag`: what a server says about machines that read its pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def opts_out(headers: Iterable[str], directives: Collection[str], user_agent: str) -> bool:
    """Whether one of these headers forbids what we do.

    A header is a list of directives (`noai, noimageai`); `otherbot: noai` is meant for that robot alone, which counts
    where it is the product that our user agent names.

    Args:
        headers: the values of all `X-Robots-Tag` headers of an answer.
        directives: that we respect, in lower case.
        user_agent: ours.
    """
    product = user_agent.partition("/")[0].strip().lower()
    for header in headers:
        robot = ""
        for part in header.lower().split(","):
            before, colon, after = part.partition(":")
            # `unavailable_after: DATE` and its like are directives with a value, not the names of robots.
            if colon and before.strip().replace("-", "_") not in _WITH_VALUE:
                robot, part = before.strip(), after
            if robot in ("", "*", product) and part.strip() in directives:
                return True
    return False


_WITH_VALUE = frozenset({"unavailable_after", "max_snippet", "max_image_preview", "max_video_preview"})
