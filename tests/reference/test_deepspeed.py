"""The DeepSpeed presets against the gates of the installed library, on logits that nobody has seen before.

Settings that make the library deterministic: no sampling of the second expert, and random token selection fed with
uniforms that fall with the position, which keeps the first tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from moedist.moe.context import TokenContext
from moedist.moe.plan import plan_capacity
from tests.moe.by_hand import preset_config, route_by

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:moe.capacity.factor", "ignore:moe.router")]
SHAPES = [(7, 4), (64, 8), (96, 5), (257, 16)]
FACTORS = (0.3, 0.5, 1.0, 1.1, 1.25, 4.0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    """``deepspeed.moe.sharded_moe`` with falling uniforms."""
    from deepspeed.moe import sharded_moe

    def falling(shape: torch.Size) -> torch.Tensor:
        return torch.linspace(1, 0.1, shape[0])[:, None].expand(shape)

    monkeypatch.setitem(sharded_moe.exp_selection_uniform_map, torch.device("cpu"), falling)
    return sharded_moe


def batches() -> Iterator[tuple[torch.Tensor, float, int]]:
    """Logits, factor, min_capacity; another seed at every run, printed by pytest when a test fails."""
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    for num_tokens, num_experts in SHAPES:
        for factor in FACTORS:
            for least in (1, 4):
                yield torch.randn(num_tokens, num_experts, generator=generator), factor, least


def compare(name: str, logits_TE: torch.Tensor, gated: tuple, slots: bool, router: dict, capacity: dict) -> None:
    """Capacity, pairs, weights, counts and the balance loss; slots too where they fill in the same order."""
    loss, weight_TEC, _, counts_E = gated
    moe = preset_config(name)
    ctx = TokenContext.of_rows(1, logits_TE.shape[0])
    routing = route_by(dataclasses.replace(moe.router, **router), logits_TE, ctx)
    plan = plan_capacity(routing, ctx, dataclasses.replace(moe.capacity, **capacity))
    assert plan.capacity == min(weight_TEC.shape[2], logits_TE.shape[0])
    got_TE = torch.zeros_like(logits_TE)
    stays_N = plan.slot_N >= 0
    got_TE[plan.token_N[stays_N], plan.expert_N[stays_N]] = plan.gate_N[stays_N]
    assert torch.equal(got_TE > 0, (weight_TEC > 0).any(2)), "other pairs were kept"
    torch.testing.assert_close(got_TE, weight_TEC.sum(2), atol=2e-6, rtol=0)
    if slots:
        slot_N = weight_TEC[plan.token_N[stays_N], plan.expert_N[stays_N]].argmax(1)
        assert torch.equal(plan.slot_N[stays_N], slot_N)
    assert torch.equal(plan.asked_E, counts_E)
    value = moe.balance["switch"].build(logits_TE.shape[1])(routing, plan, ctx)
    assert value.item() == pytest.approx(loss.item(), abs=2e-6)


def test_top1(library):
    for logits_TE, factor, least in batches():
        gated = library.top1gating(logits_TE, factor, least, use_rts=True)
        capacity = {"factor": factor, "min_capacity": least, "drop_policy": "token"}
        compare("deepspeed_top1", logits_TE, gated, True, {}, capacity)


def test_top2(library):
    for logits_TE, factor, least in batches():
        gated = library.top2gating(logits_TE.clone(), factor, least, top2_2nd_expert_sampling=False)
        compare("deepspeed_top2", logits_TE, gated, True, {}, {"factor": factor, "min_capacity": least})


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize(("theirs", "ours"), [("probs", "probability"), ("position", "token")])
def test_topk(library, top_k, theirs, ours):
    for logits_TE, factor, least in batches():
        gated = library.topkgating(logits_TE, top_k, factor, least, drop_policy=theirs)
        capacity = {"factor": factor, "min_capacity": least, "drop_policy": ours}
        compare("deepspeed_topk", logits_TE, gated, ours == "token", {"top_k": top_k}, capacity)


def test_random_selection_keeps_as_many(library, monkeypatch):
    """The preset's own policy: other tokens than theirs, the same number of them, and the same limit."""
    monkeypatch.delitem(library.exp_selection_uniform_map, torch.device("cpu"))
    moe = preset_config("deepspeed_top1")
    assert moe.capacity.drop_policy == "random"
    for logits_TE, factor, least in batches():
        weight_TEC = library.top1gating(logits_TE, factor, least)[1]
        ctx = TokenContext.of_rows(1, logits_TE.shape[0])
        capacity = dataclasses.replace(moe.capacity, factor=factor, min_capacity=least)
        plan = plan_capacity(route_by(moe.router, logits_TE, ctx), ctx, capacity)
        assert torch.equal(plan.kept_E, (weight_TEC > 0).sum((0, 2)))
