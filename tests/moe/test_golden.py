"""Tables that others worked out: NumPy in fp64, and DeepSpeed's own gates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.plan import plan_capacity
from tests.moe.by_hand import dropless, kept, route_logits

pytestmark = pytest.mark.filterwarnings("ignore:moe.capacity.factor", "ignore:moe.router.renormalize")
FOLDER = Path(__file__).parent.parent / "golden"
ROUTING = json.loads((FOLDER / "routing.json").read_text())
DEEPSPEED = json.loads((FOLDER / "gates_deepspeed.json").read_text())
LOGITS = torch.tensor(DEEPSPEED["logits"])

# golden case -> the router's and the plan's settings of the same meaning
FIRST = {"top_k": 1}
CASES = {
    "top1 cf=4 use_rts=False (no overflow)": (FIRST, {"factor": 4.0}),
    "top1 drop_tokens=False": (FIRST, {"factor": None}),
    "top1 cf=1.0 RTS with injected decreasing uniforms": (FIRST, {"factor": 1.0, "drop_policy": "token"}),
    "top1 cf=0.5 RTS with injected decreasing uniforms": (FIRST, {"factor": 0.5, "drop_policy": "token"}),
    "top1 cf=4 used_token masks 0 and 7": (FIRST, {"factor": 4.0}),
    "top1 cf=1 min_capacity=8": (FIRST, {"factor": 1.0, "min_capacity": 8}),
    **{
        f"top2 cf={factor} sampling=False": ({"top_k": 2}, {"factor": factor, "drop_policy": "choice"})
        for factor in (0.5, 1.0, 1.25)
    },
    "top2 drop_tokens=False sampling=False": ({"top_k": 2}, {"factor": None}),
    **{
        f"topk k={k} cf={factor} {name}": ({"top_k": k, "renormalize": True}, {"factor": factor, "drop_policy": policy})
        for k, factors in ((1, (0.5, 1.0)), (2, (0.5, 1.0)), (3, (0.5, 1.0)))
        for factor in factors
        for name, policy in (("probs", "probability"), ("position", "token"))
    },
    **{f"topk k={k} drop_tokens=False": ({"top_k": k, "renormalize": True}, {"factor": None}) for k in (1, 2, 3)},
}


def test_every_deepspeed_case_is_used():
    assert set(CASES) == set(DEEPSPEED["cases"])


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_gates(name):
    """The same pairs with the same weights, and the same balance loss where its definition is ours."""
    router, capacity = CASES[name]
    expected = DEEPSPEED["cases"][name]
    valid_T = torch.ones(10, dtype=torch.bool)
    if "used_token" in name:
        valid_T[[0, 7]] = False
    ctx = TokenContext.of_rows(1, 10, valid_T=valid_T)
    routing = route_logits(LOGITS, ctx, **router)
    plan = plan_capacity(routing, ctx, CapacityConfig(**capacity))
    rows = expected["token_expert_slot_weight"]
    got = {(token, expert): slot for token, expert, slot in kept(plan)}
    assert sorted(got) == sorted((token, expert) for token, expert, _, _ in rows)
    weights = dict(
        zip(zip(plan.token_N.tolist(), plan.expert_N.tolist(), strict=True), plan.gate_N.tolist(), strict=True)
    )
    for token, expert, slot, weight in rows:
        # Six digits of a softmax that DeepSpeed rounds after rescaling.
        assert weights[token, expert] == pytest.approx(weight, abs=2e-6)
        if capacity.get("drop_policy") in ("choice", "token"):
            assert got[token, expert] == slot
    assert plan.asked_E.tolist() == expected["exp_counts"]
    if capacity["factor"] is not None:
        assert plan.capacity == expected["capacity"]
    if "used_token" not in name and "top2" not in name:  # theirs count padding, or first choices only
        loss = SwitchConfig().build(4)(routing, plan, ctx)
        assert loss.item() == pytest.approx(expected["l_aux"], abs=2e-6)


def test_softmax_top_2_and_logsumexp():
    case, ctx = ROUTING["G1"], TokenContext.of_rows(1, 1)
    routing = route_logits(torch.tensor([case["logits"]], dtype=torch.float64), ctx, top_k=2)
    assert routing.probs_TE[0].tolist() == pytest.approx(case["softmax"], abs=1e-9)
    assert routing.expert_N.tolist() == case["top2_idx"]
    dense = torch.zeros(4).double().scatter(0, routing.expert_N, routing.gate_N)
    assert dense.tolist() == pytest.approx(case["top2_renorm"], abs=1e-9)
    z_loss = ZLossConfig().build(4)(routing, dropless(routing, ctx), ctx)
    assert z_loss.item() == pytest.approx(case["logsumexp"] ** 2, abs=1e-12)


def test_six_tokens_with_one_and_two_choices():
    case, ctx = ROUTING["G4"], TokenContext.of_rows(1, 6)
    logits_TE = torch.tensor(case["logits"], dtype=torch.float64)
    for top_k, raw in ((1, None), (2, False), (2, True)):
        routing = route_logits(logits_TE, ctx, top_k=top_k, renormalize=raw)
        plan = dropless(routing, ctx)
        switch = SwitchConfig().build(4)(routing, plan, ctx).item()
        if top_k == 1:
            assert routing.expert_N.tolist() == case["top1_idx"]
            assert switch == pytest.approx(case["loss_top1_switch"], abs=1e-12)
        else:
            weights = case["top2_weights_renorm" if raw else "top2_weights_raw"]
            assert routing.expert_N.view(6, 2).tolist() == case["top2_idx"]
            assert routing.gate_N.tolist() == pytest.approx([w for row in weights for w in row], abs=1e-9)
            assert switch == pytest.approx(case["loss_top2_switch"], abs=1e-12)
        assert routing.probs_TE.mean(0).tolist() == pytest.approx(case["P"], abs=1e-9)
        z_loss = ZLossConfig().build(4)(routing, plan, ctx).item()
        assert z_loss == pytest.approx(case["z_loss"], abs=1e-12)


@pytest.mark.parametrize("name", ["G6_k1_c2", "G6_k2_c2", "G6_k2_c3"])
def test_token_order_drops(name):
    case, ctx = ROUTING[name], TokenContext.of_rows(1, 4)
    logits_TE = torch.tensor(case["probs"], dtype=torch.float64).log()
    routing = route_logits(logits_TE, ctx, top_k=case["k"])
    plan = plan_capacity(routing, ctx, CapacityConfig(expert_capacity=case["capacity"], drop_policy="token"))
    assert routing.expert_N.view(4, -1).tolist() == case["drop_idx"]
    assert (plan.slot_N >= 0).view(4, -1).tolist() == case["drop_keep"]
    loss = SwitchConfig().build(3)(routing, plan, ctx)
    assert loss.item() == pytest.approx(case["loss_f_precapacity_switch"], abs=1e-12)
