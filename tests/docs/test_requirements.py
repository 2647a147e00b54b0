"""Every row of docs/requirements.md has a test, and the page is that of the table and the tests."""

from __future__ import annotations

import pkgutil

import pytest

from tests.docs.pages import ROOT
from tests.docs.requirements_page import (
    PAGE,
    SECTIONS,
    read_table,
    result_of,
    rows_of_sources,
    section_of,
    text,
    without_results,
)

ROWS, TESTS = read_table(), rows_of_sources()


def test_all_rows_are_in_the_table():
    sizes = {"R0": 45, "R1": 48, "R2": 62, "R3": 20}
    names = [f"{source}-{number:02}" for source, size in sizes.items() for number in range(1, size + 1)]
    names += [
        f"{letter}{number}" for letter, size in {"C": 26, "D": 19, "G": 16}.items() for number in range(1, size + 1)
    ]
    assert list(ROWS) == names
    assert list(SECTIONS) == list(dict.fromkeys(map(section_of, ROWS)))


def test_every_row_has_a_test():
    assert TESTS.keys() <= ROWS.keys(), "a mark or a name names no row"
    assert not ROWS.keys() - TESTS.keys()


@pytest.mark.parametrize("row", ROWS)
def test_places_exist(row: str):
    """Keys and choices are looked up by tests/docs/test_pages.py."""
    for place in ROWS[row].where:
        if place.startswith("moedist."):
            pkgutil.resolve_name(place)
        elif "/" in place and "=" not in place:
            assert (ROOT / place).exists(), place


def test_the_page_is_that_of_the_table_and_the_tests():
    assert without_results(PAGE.read_text()) == without_results(text()), (
        "run: python -m tests.docs.requirements_page --write"
    )


def test_results():
    results = {"a": ["pass", "pass"], "b": ["pass", "fail"], "c": ["skip"]}
    assert [result_of([name], results) for name in "abcd"] == ["pass", "**fail**", "skipped", "not run"]
    assert result_of("ac", results) == "pass, 1 skipped" and result_of("ab", results) == "**fail**"
    assert result_of("ad", results) == "not run" and result_of([], results) == "not run"
