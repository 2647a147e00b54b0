"""docs/concepts.md explains the words that the other pages use, and is found by those who need it."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

TEXT = (ROOT / "docs" / "concepts.md").read_text()


def test_R1_47_every_word_is_explained_to_newcomers():
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", TEXT, re.MULTILINE))
    words = ("expert", "router", "pair", "gate", "load", "capacity", "drop", "balance loss", "expert parallel")
    assert all(rows.get(word) for word in words)
    assert "(docs/concepts.md)" in (ROOT / "README.md").read_text()


@pytest.mark.requirement("R1-13", "R1-15")
def test_R2_60_advice():
    """On experts and choices, the balance coefficient, the temperature, and what to watch."""
    advice = TEXT.partition("## Where to begin")[2]
    for subject in ("Experts and choices", "Balance", "Temperature", "Capacity", "Attention experts", "Watch"):
        assert f"- **{subject}" in advice
    for kind in ("Standard", "hyperbolic", "linear", "edge-featured"):
        assert kind in advice
    for value in ("0.01", "0.05", "0.1", "0.005", "0.5 to 0.8", "1.2 to 2", "4 to 8", "8 to 16"):
        assert value in advice
