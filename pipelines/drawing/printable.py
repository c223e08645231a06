"""Text from the web made harmless to show: nothing in it moves the cursor, reverses the text or hides."""

# Invisible but needed: they join the parts of an emoji and separate letters in Persian and Indic words.
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """Return the text on one line, with a blank for any white space and U+FFFD for other invisible characters."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable() or character in JOINERS:
        return character
    return " " if character.isspace() else "\ufffd"
