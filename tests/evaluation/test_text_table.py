"""Tables of text and Markdown."""

from d2v_composer.report.tables import format_table


def test_aligns_the_first_column_left_and_the_others_right() -> None:
    lines = format_table(["", "top-1", "top-3"], [["ours", "7.0"], ["1e3", "10.00", "3"]]).splitlines()
    assert lines == ["        top-1    top-3", "ours      7.0", "1e3     10.00        3"]
    assert format_table(["", "top-1"], []).split() == ["top-1"]
