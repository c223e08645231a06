"""Text of strangers on a terminal or a page."""

from pipelines.drawing.printable import printable


def test_text_is_shown_on_one_line_without_what_steers_a_terminal() -> None:
    assert printable("plain text") == "plain text"
    assert (
        printable("a\r\n\tb\x00\x1b\x7f\x9b\u2028\u202e\u2066\ufeff\udc80")
        == "a   b" + "\ufffd" * 4 + " " + "\ufffd" * 4
    )
    assert printable("👩\u200d🚀 日本 ñ") == "👩\u200d🚀 日本 ñ"
