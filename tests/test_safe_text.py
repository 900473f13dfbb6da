"""Names made fit for a terminal and a spreadsheet."""

import os

import pytest

from safe_text import csv_cell, printable


@pytest.mark.parametrize(("text", "expected"), [
    ("a cat, ä 漢 🐈", "a cat, ä 漢 🐈"),
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("two\nlines\r\t", r"two\nlines\r\t"),
    ("\u202eright to left", r"\u202eright to left"),
    (os.fsdecode(b"\xff.jpg"), r"\udcff.jpg"),
    ("\x9b31m\x00", r"\x9b31m\x00"),
])
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected and expected.encode()


@pytest.mark.parametrize(("text", "expected"), [
    ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@SUM(A1)", "'@SUM(A1)"), ("'=1", "'=1"), ("a=1", "a=1"),
    ("", ""), ("\t=1", r"\t=1"), ("\n=1", r"\n=1"),
])
def test_csv_cell(text, expected):
    assert csv_cell(text) == expected
    assert csv_cell(expected) == expected
