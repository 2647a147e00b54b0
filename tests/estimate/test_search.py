"""The search tries what train accepts, no less and no more."""

from __future__ import annotations

import itertools

from moedist.estimate.cluster import read_clusters
from moedist.estimate.search import layouts, search
from moedist.launch.compose import compose
from moedist.launch.validate import accepts

CONFIG = compose(
    ["experiment=olmoe_1b_7b", "model.layers.num_layers=2", "train.global_batch_tokens=131072", "launch.nnodes=1"]
).config
WORLD = 8


def test_every_layout_that_train_accepts_is_ranked():
    cluster = read_clusters()["h100"]
    found = search(CONFIG, 50_304, WORLD, cluster, accepts)
    tried = {one.overrides for one in found}
    sizes = (1, 2, 4, 8)
    wanted = {
        (f"mesh.ep={ep}", f"mesh.fsdp={fsdp}", f"train.micro_batch={rows}", f"train.activation_checkpointing={again}")
        for ep, fsdp, rows, again in itertools.product(
            sizes, ("null", *sizes), (1, 2, 4), ("none", "selective", "full")
        )
        if fsdp == "null" or fsdp % ep == 0
    }
    assert tried == wanted
    fit = [one.estimate for one in found if one.estimate.fits]
    assert fit == [one.estimate for one in found][: len(fit)]
    speeds = [one.tokens_per_second for one in fit]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > speeds[-1]
    assert {one.tokens_per_step for one in fit} == {131_072}


def test_what_train_refuses_is_left_out():
    candidates = [candidate for _, candidate in layouts(CONFIG, WORLD)]
    found = search(CONFIG, 50_304, WORLD, read_clusters()["h100"], lambda config, world: config.mesh.ep == 2)
    assert {one.estimate.layout.ep for one in found} == {2}
    assert all(accepts(candidate, WORLD) for candidate in candidates)
