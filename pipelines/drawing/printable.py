"""Text from the web, made harmless to show: nothing in it moves a cursor, turns the writing direction or hides."""

from __future__ import annotations

# They join the parts of an emoji and the letters of Persian and Indic words.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """The text on one line: white space of any kind is a blank, other characters that cannot be seen are U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return " " if character.isspace() else "\ufffd"
