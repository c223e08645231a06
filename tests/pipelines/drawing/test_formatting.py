"""Numbers as people read them."""

import math

from pipelines.drawing.formatting import format_age, format_bytes, format_count, format_seconds, sparkline


def test_sizes_times_and_counts_read_well() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [format_seconds(s) for s in (0.4, 61, 7384)] == ["0.4 s", "1 min 01 s", "2 h 03 min"]
    assert [format_age(s) for s in (-1, 59, 93.4, 7199, 7200, 3 * 86_400)] == [
        "0 s",
        "59 s",
        "1 min",
        "119 min",
        "2 h",
        "3 d",
    ]
    assert [format_count(count) for count in (None, 0, 4060)] == ["", "0", "4,060"]


def test_a_sparkline_falls_with_its_values() -> None:
    assert sparkline([1.0, 0.75, 0.5, 0.25, 0.0]) == "1.0000 █▆▄▂▁ 0.0000"
    assert sparkline([5.0, 5.0]) == "5.0000 ▁▁ 5.0000"


def test_a_long_sparkline_is_averaged_into_its_width() -> None:
    assert sparkline([0.0, 2.0, 4.0, 6.0, 8.0], width=3) == "1.0000 ▁▅█ 8.0000"


def test_a_sparkline_leaves_out_what_is_not_finite() -> None:
    assert sparkline([1.0, math.nan, math.inf, 0.0]) == "1.0000 █▁ 0.0000"
    assert sparkline([math.nan]) == ""
