"""Tables as Markdown and CSV."""

import numpy as np
import pytest
import scipy.stats

from ktransfer import tables


def test_cells_are_crossed_in_the_order_in_which_they_come():
    cells = [("b", "y", "1"), ("a", "x", "2"), ("b", "x", "3"), ("c", "z", "4")]
    header, rows = tables.crossed("k", cells)
    assert header == ["k", "y", "x", "z"]
    assert rows == [["b", "1", "3", "-"], ["a", "-", "2", "-"], ["c", "-", "-", "4"]]


def test_markdown_plain_and_aligned():
    header, rows = ["", "top-1"], [["one", "5"], ["a", "12.5 ± 1"]]
    assert tables.markdown(header, rows) == ["|  | top-1 |", "|---|---|", "| one | 5 |", "| a | 12.5 ± 1 |"]
    assert tables.markdown(header, rows, aligned=True) == [
        "|     | top-1    |",
        "|-----|----------|",
        "| one | 5        |",
        "| a   | 12.5 ± 1 |",
    ]


def test_wide_tables_are_turned():
    header = [str(number) for number in range(tables.WIDE + 2)]
    row = [f"{number}!" for number in range(len(header))]
    assert tables.turned(header[:-1], [row[:-1]]) == (header[:-1], [row[:-1]])
    assert tables.turned(header, [row]) == (
        ["0", "0!"],
        [[a, b] for a, b in zip(header[1:], row[1:], strict=True)],
    )


def test_values_with_and_without_an_interval():
    assert tables.plus_minus(12.345, None) == "12.3"
    assert tables.plus_minus(12.345, 0.06) == "12.3 ± 0.1"
    assert tables.plus_minus(1.25, 2.0, sign="+") == "+1.2 ± 2.0"


def test_csv_there_and_back(tmp_path):
    rows = [{"a": 1, "b": None}, {"a": "x, y", "c": 0.5}]
    text = tables.to_csv(rows)
    assert text == 'a,b,c\n1,,\n"x, y",,0.5\n'
    (tmp_path / "t.csv").write_text(text)
    assert tables.read_csv(tmp_path / "t.csv") == [{"a": "1", "b": "", "c": ""}, {"a": "x, y", "b": "", "c": "0.5"}]
    assert tables.to_csv([], ["a", "b"]) == "a,b\n"


def test_one_number_has_no_interval_and_several_have_students():
    assert tables.mean([3.0]) == (3.0, None)
    values = [1.0, 2.0, 4.0]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    value, half = tables.mean(values)
    assert (value - half, value + half) == pytest.approx((low, high))
