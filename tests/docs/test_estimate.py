"""The table of docs/estimate.md is the command's, and every entry and key of clusters is named there."""

from __future__ import annotations

import dataclasses

from moedist.estimate.cluster import Cluster, read_clusters
from tests.docs.estimate_table import BEGIN, END, PAGE, RECIPES, text

TEXT = PAGE.read_text()


def test_the_table_is_that_of_the_command():
    inside = TEXT.partition(BEGIN)[2].partition(END)[0]
    assert inside == text(), "run: python -m tests.docs.estimate_table --write"
    assert all(f"`{name}`" in inside for name in RECIPES)


def test_clusters_and_their_keys_are_named():
    assert all(f"`{name}`" in TEXT for name in read_clusters())
    assert all(field.name in TEXT for field in dataclasses.fields(Cluster))
