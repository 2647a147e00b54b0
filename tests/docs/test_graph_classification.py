"""The graph example learns, and learns from the graph."""

from __future__ import annotations

import runpy

import pytest
import torch

from tests.docs.pages import ROOT

EXAMPLE = runpy.run_path(str(ROOT / "docs" / "examples" / "graph_classification.py"))


@pytest.mark.requirement("R2-55")
def test_most_members_are_found_by_their_friends():
    adjacency, edges, side = EXAMPLE["karate_club"]()
    assert side.float().mean() == 0.5  # so that half is what guessing gives
    assert EXAMPLE["accuracy_of"](adjacency, edges, side, seed=0, steps=15) >= 0.75


@pytest.mark.slow
def test_nobody_is_found_without_them():
    adjacency, edges, side = EXAMPLE["karate_club"]()
    means = [
        sum(EXAMPLE["accuracy_of"](seen, edges, side, seed) for seed in range(5)) / 5
        for seen in (adjacency, torch.zeros_like(adjacency))
    ]
    assert means[0] > 0.8 and means[1] < 0.65
