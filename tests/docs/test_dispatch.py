"""docs/dispatch.md has a row for every dispatcher, and the table that the command makes."""

from __future__ import annotations

from moedist.launch.choices import list_choices
from moedist.moe.dispatch.contract import DispatchConfig
from tests.docs.dispatch_table import BEGIN, END, PAGE, text

TEXT = PAGE.read_text()


def test_the_table_is_that_of_the_command():
    inside = TEXT.partition(BEGIN)[2].partition(END)[0].strip()
    assert inside == text().strip(), "run: python -m tests.docs.dispatch_table --write"


def test_every_dispatcher_has_a_row():
    for kind in list_choices(DispatchConfig):
        assert f"\n| `{kind}`" in TEXT, f"docs/dispatch.md has no row for moe/dispatch={kind}"
