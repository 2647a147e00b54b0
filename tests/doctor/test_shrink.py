"""A small copy of every recipe: it fits, and what is checked is still there."""

from __future__ import annotations

import pytest

from moedist.doctor.shrink import Layout, shrink, shrink_layout
from moedist.launch.compose import compose, compose_onto
from moedist.launch.parity import plan_parity
from moedist.model.size import model_size

RECIPES = ("tiny_cpu", "olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_becomes_small(recipe: str):
    composed = compose([f"experiment={recipe}"])
    plan = plan_parity(composed)
    before, after = composed.config, plan.composed.config
    size = model_size(after.model.build(1000, after.moe, device="meta"))
    assert size.total < 5e6 and after.launch.nproc == plan.ranks.world_size <= 4
    assert (after.train.precision, after.train.clip_norm) == ("fp64", None)
    for part in ("router", "capacity", "dispatch", "balance", "bank"):
        assert getattr(after.moe, part) == getattr(before.moe, part)
    assert after.moe.num_experts == before.moe.num_experts and after.engine == before.engine
    assert after.train.activation_checkpointing == before.train.activation_checkpointing
    assert after.train.accumulation(plan.ranks.world_size) == min(2, before.train.accumulation(
        before.launch.nproc * before.launch.nnodes))  # fmt: skip
    if recipe != "tiny_cpu":
        assert any(line.startswith("data: synthetic, 8192 ids") for line in plan.changes)
        assert f"model.dim: {before.model.dim} -> 64" in plan.changes
        assert plan.changes[0].startswith("ranks: ") and "mesh.ep" in plan.changes[0]


def test_blocks_that_are_listed_and_heads_without_a_width():
    lists = "[{repeat: 20}, {repeat: 9, ffn: {kind: moe}}, {ffn: {kind: moe, moe: {num_experts: 16}}}]"
    composed = compose(
        ["experiment=null", "model/layers=listed", f"model.layers.blocks={lists}", "model.dim=1024"]
        + ["model.attention.num_heads=64", "model.attention.head_dim=null"]
    )
    small = shrink(composed.mapping, Layout(4, 2, None), device="cpu", precision="fp64", accumulation=1)
    config = compose_onto(small.mapping).config
    assert [spec.repeat for spec in config.model.layers.blocks] == [1, 1, 1]
    assert config.model.layers.blocks[2].ffn.moe.num_experts == 16
    assert (config.model.attention.num_heads, config.model.attention.head_dim) == (64, 16)
    assert composed.mapping["model"]["dim"] == 1024, "the user's own stays"


def test_blocks_in_turn_keep_two_with_experts():
    composed = compose(
        ["experiment=null", "model.layers.num_layers=30", "model.layers.first_dense=3", "model.layers.moe_every=4"]
    )
    small = shrink(composed.mapping, Layout(2, 2, None), device="cpu", precision="fp32", accumulation=8)
    layers = compose_onto(small.mapping).config.model.layers
    assert (layers.num_layers, layers.first_dense, layers.moe_every) == (5, 1, 2)
    assert "model.layers.num_layers: 30 -> 5" in small.changes


@pytest.mark.parametrize(
    ("wanted", "limit", "expected"),
    [
        (Layout(1024, 64, None), 4, Layout(4, 4, None)),
        (Layout(1024, 64, 1024), 4, Layout(4, 4, 4)),
        (Layout(16, 2, 4), 4, Layout(4, 2, 2)),
        (Layout(16, 2, 16), 4, Layout(4, 2, 4)),
        (Layout(6, 6, None), 4, Layout(3, 3, None)),
        (Layout(4, 1, None), 4, Layout(2, 1, None)),
        (Layout(1, 1, None), 2, Layout(1, 1, None)),
        (Layout(64, 16, None, 8), 4, Layout(4, 4, None, 2)),
        (Layout(6, 6, None, 2), 4, Layout(3, 3, None, 1)),
        (Layout(64, 8, None, 8), 4, Layout(4, 4, None)),
    ],
)
def test_ranks(wanted: Layout, limit: int, expected: Layout):
    assert shrink_layout(wanted, limit) == expected
