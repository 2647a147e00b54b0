"""docs/engines.md has every row of the table of engines, and the rows are true."""

from __future__ import annotations

import pytest

from tests.docs.engine_table import BEGIN, END, ENGINES, PAGE, TOLERANCE, measure


def rows_on_the_page() -> list[tuple[str, ...]]:
    inside = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    return [tuple(cell.strip(" `") for cell in line.split("|")[1:-1]) for line in inside]


def test_every_row_is_on_the_page():
    rows = [(row.engine, row.weights, str(row.ep), row.precision) for rows, _ in ENGINES.values() for row in rows()]
    assert [row[:4] for row in rows_on_the_page()] == rows, "run: python -m tests.docs.engine_table --write"


def test_the_page_claims_no_more_than_the_tolerance():
    for _, _, _, precision, loss, gradient, norm, same in rows_on_the_page():
        assert max(float(loss), float(gradient), float(norm)) <= TOLERANCE[precision] and same == "yes"


@pytest.mark.slow
def test_the_rows_are_true():
    """Pitfalls 1 and 2: losses of 20 steps, gradients and norms, made anew."""
    for each in measure():
        assert each.same_norm, each
        assert max(each.loss, each.gradient, each.norm) <= TOLERANCE[each.row.precision], each
