"""Tables that others worked out: NumPy in fp64, and DeepSpeed's own gates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.bank.dispatched import DispatchedConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.plan import plan_capacity
from moedist.moe.router.contract import Routing
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import dropless, kept, preset_config, route_by, route_logits, routing_of

pytestmark = pytest.mark.filterwarnings("ignore:moe.capacity.factor", "ignore:moe.router.renormalize")
FOLDER = Path(__file__).parent.parent / "golden"
ROUTING = json.loads((FOLDER / "routing.json").read_text())
DEEPSPEED = json.loads((FOLDER / "gates_deepspeed.json").read_text())
LOGITS = torch.tensor(DEEPSPEED["logits"])

# golden case -> preset, and what the case sets otherwise. Random token selection with injected decreasing uniforms
# keeps the first tokens: drop_policy token.
CASES: dict[str, tuple[str, dict, dict]] = {
    "top1 cf=4 use_rts=False (no overflow)": ("deepspeed_top1", {}, {"factor": 4.0}),
    "top1 drop_tokens=False": ("deepspeed_top1", {}, {"factor": None}),
    "top1 cf=1.0 RTS with injected decreasing uniforms": ("deepspeed_top1", {}, {"factor": 1.0}),
    "top1 cf=0.5 RTS with injected decreasing uniforms": ("deepspeed_top1", {}, {"factor": 0.5}),
    "top1 cf=4 used_token masks 0 and 7": ("deepspeed_top1", {}, {"factor": 4.0}),
    "top1 cf=1 min_capacity=8": ("deepspeed_top1", {}, {"factor": 1.0, "min_capacity": 8}),
    **{f"top2 cf={factor} sampling=False": ("deepspeed_top2", {}, {"factor": factor}) for factor in (0.5, 1.0, 1.25)},
    "top2 drop_tokens=False sampling=False": ("deepspeed_top2", {}, {"factor": None}),
    **{
        f"topk k={k} cf={factor} {name}": ("deepspeed_topk", {"top_k": k}, {"factor": factor, "drop_policy": policy})
        for k, factors in ((1, (0.5, 1.0)), (2, (0.5, 1.0)), (3, (0.5, 1.0)))
        for factor in factors
        for name, policy in (("probs", "probability"), ("position", "token"))
    },
    **{f"topk k={k} drop_tokens=False": ("deepspeed_topk", {"top_k": k}, {"factor": None}) for k in (1, 2, 3)},
}


def test_every_deepspeed_case_is_used():
    assert set(CASES) == set(DEEPSPEED["cases"])


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_gates(name):
    """The same pairs with the same weights, and the same balance loss where its definition is ours."""
    preset, router, capacity = CASES[name]
    moe = preset_config(preset)
    if preset == "deepspeed_top1":
        capacity = {"drop_policy": "token"} | capacity
    # The golden file was made with min_capacity 1 where its name says nothing else.
    capacity = dataclasses.replace(moe.capacity, **{"min_capacity": 1} | capacity)
    router = dataclasses.replace(moe.router, **router)
    expected = DEEPSPEED["cases"][name]
    valid_T = torch.ones(10, dtype=torch.bool)
    if "used_token" in name:
        valid_T[[0, 7]] = False
    ctx = TokenContext.of_rows(1, 10, valid_T=valid_T)
    routing = route_by(router, LOGITS, ctx)
    plan = plan_capacity(routing, ctx, capacity)
    rows = expected["token_expert_slot_weight"]
    got = {(token, expert): slot for token, expert, slot in kept(plan)}
    assert sorted(got) == sorted((token, expert) for token, expert, _, _ in rows)
    weights = dict(
        zip(zip(plan.token_N.tolist(), plan.expert_N.tolist(), strict=True), plan.gate_N.tolist(), strict=True)
    )
    for token, expert, slot, weight in rows:
        # Six digits of a softmax that DeepSpeed rounds after rescaling.
        assert weights[token, expert] == pytest.approx(weight, abs=2e-6)
        if capacity.drop_policy in ("choice", "token") and not capacity.dropless:
            assert got[token, expert] == slot
    assert plan.asked_E.tolist() == expected["exp_counts"]
    if capacity.factor is not None:
        assert plan.capacity == expected["capacity"]
    if "used_token" not in name:  # theirs counts padding
        loss = moe.balance["switch"].build(4)(routing, plan, ctx)
        assert loss.item() == pytest.approx(expected["l_aux"], abs=2e-6)


@pytest.mark.requirement("G1", "R1-21", "R2-13")
def test_softmax_top_2_and_logsumexp():
    case, ctx = ROUTING["G1"], TokenContext.of_rows(1, 1)
    routing = route_logits(torch.tensor([case["logits"]], dtype=torch.float64), ctx, top_k=2)
    assert routing.probs_TE[0].tolist() == pytest.approx(case["softmax"], abs=1e-9)
    assert routing.expert_N.tolist() == case["top2_idx"]
    dense = torch.zeros(4).double().scatter(0, routing.expert_N, routing.gate_N)
    assert dense.tolist() == pytest.approx(case["top2_renorm"], abs=1e-9)
    z_loss = ZLossConfig().build(4)(routing, dropless(routing, ctx), ctx)
    assert z_loss.item() == pytest.approx(case["logsumexp"] ** 2, abs=1e-12)


@pytest.mark.requirement("G4", "C26")
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
            assert top_k * switch == pytest.approx(case["loss_top2_hf_mixtral"], abs=1e-12), "theirs is K times ours"
            first = SwitchConfig(count="first").build(4)(routing, plan, ctx).item()
            assert first == pytest.approx(case["loss_top2_deepspeed_top2gating"], abs=1e-12)
        assert routing.probs_TE.mean(0).tolist() == pytest.approx(case["P"], abs=1e-9)
        z_loss = ZLossConfig().build(4)(routing, plan, ctx).item()
        assert z_loss == pytest.approx(case["z_loss"], abs=1e-12)


@pytest.mark.requirement("G6", "R0-29", "R0-30")
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
    sent = {
        name: plan_capacity(
            routing,
            ctx,
            CapacityConfig(
                expert_capacity=case["capacity"],
                drop_policy="token",
                overflow="next_best",
                renormalize_after_drop=name,
            ),
        )
        for name in (False, "one")
    }
    # The sequential rule: token by token, each takes its best experts that have room. Where it finds none, the golden
    # table repeats the last index with weight 0.
    pairs = {(token, expert) for token, expert, _ in kept(sent["one"])}
    expected = {
        (token, expert): weight
        for token, (experts, weights) in enumerate(zip(case["entrenar_idx"], case["entrenar_w"], strict=True))
        for expert, weight in zip(experts, weights, strict=True)
        if weight > 0
    }
    assert pairs == set(expected)
    got = {
        (token, expert): gate
        for token, expert, gate, slot in zip(
            *(getattr(sent["one"], field).tolist() for field in ("token_N", "expert_N", "gate_N", "slot_N")),
            strict=True,
        )
        if slot >= 0
    }
    assert got == pytest.approx(expected, abs=1e-9)
    if len(expected) < 4 * case["k"]:
        return  # the table's loss counts repeated indices too
    share_E = sent["one"].kept_E.double() / sent["one"].kept_E.sum()
    after = 3 * (share_E * routing.probs_TE.mean(0)).sum().item()
    assert after == pytest.approx(case["loss_f_postcapacity_entrenar"], abs=1e-12)


def sine_router(num_tokens: int, dim: int, num_experts: int, frequency: float, **config: object) -> Routing:
    """The router of G7: weights sin(0.4567 i) sqrt(2 / (D + E)) over [D, E], inputs sin(frequency i) over [T, D]."""
    router = TopKConfig(**config).build(dim, num_experts, dtype=torch.float64)
    weight_N = (0.4567 * torch.arange(dim * num_experts, dtype=torch.float64)).sin()
    with torch.no_grad():
        router.weight.copy_((weight_N * (2 / (dim + num_experts)) ** 0.5).view(dim, num_experts).t())
    x_TD = (frequency * torch.arange(num_tokens * dim, dtype=torch.float64)).sin().view(num_tokens, dim)
    return router(x_TD, TokenContext.of_rows(1, num_tokens))


@pytest.mark.requirement("G7")
def test_a_whole_router():
    """G7: one expert's weights of the table, then 16 tokens, top-2 of 4, factor 2."""
    weight_4 = (0.4567 * torch.arange(4, dtype=torch.float64)).sin() * (2 / (64 + 8)) ** 0.5
    assert weight_4.tolist() == pytest.approx(ROUTING["G7_init"]["gate_0_0to3"], abs=1e-7)
    case, ctx = ROUTING["G7_real_forward"], TokenContext.of_rows(1, 16)
    routing = sine_router(16, 8, 4, 0.77, top_k=2)
    assert routing.expert_N.view(16, 2).tolist() == case["idx"]
    assert routing.gate_N[:2].tolist() == pytest.approx(case["w_row0"], abs=1e-6)
    assert routing.probs_TE.mean(0).tolist() == pytest.approx(case["P"], abs=1e-6)
    plan = plan_capacity(routing, ctx, CapacityConfig(factor=2.0))
    assert plan.capacity == case["capacity"]
    assert (plan.asked_E / plan.asked_E.sum()).tolist() == case["f"]
    assert SwitchConfig().build(4)(routing, plan, ctx).item() == pytest.approx(case["balance_loss"], abs=2e-6)


@pytest.mark.requirement("G7")
def test_a_whole_router_that_overflows():
    """G7: 8 tokens, top-1 of 4 experts with room for 2 each, sent on in token order."""
    case, ctx = ROUTING["G7_capacity_test"], TokenContext.of_rows(1, 8)
    routing = sine_router(8, 8, 4, 1.23, top_k=1)
    assert routing.expert_N.tolist() == case["pre_capacity_argmax"]
    plan = plan_capacity(routing, ctx, CapacityConfig(factor=1.0, drop_policy="token", overflow="next_best"))
    assert plan.capacity == case["capacity"] and plan.kept_E.tolist() == case["counts"]
    assert [[expert] for expert in plan.expert_N.tolist()] == case["idx"]
    assert SwitchConfig().build(4)(routing, plan, ctx).item() == pytest.approx(case["loss_pre"], abs=1e-6)


@pytest.mark.requirement("G10", "R2-11")
@pytest.mark.parametrize("temperature", ROUTING["G10"])
def test_temperature(temperature):
    """G10: logits 2, 1, 0 through the two-layer router, whose maps are the identity here."""
    case = ROUTING["G10"][temperature]
    router = MLPConfig(hidden_dim=3, temperature=float(temperature)).build(3, 3, dtype=torch.float64)
    with torch.no_grad():
        router.hidden_weight.copy_(torch.eye(3))
        router.weight.copy_(torch.eye(3))
        router.hidden_bias.zero_(), router.bias.zero_()
    routing = router(torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64), TokenContext.of_rows(1, 1))
    assert routing.probs_TE[0].tolist() == pytest.approx(case["p"], abs=1e-8)
    assert torch.special.entr(routing.probs_TE).sum().item() == pytest.approx(case["entropy"], abs=1e-12)


@pytest.mark.requirement("R0-32", "C14", "D2", "G14")
def test_noise_has_the_documented_deviation():
    """G14: uniform noise on [-s, s] has s / sqrt(3) and was called gaussian; ours is what it is called."""
    case, ctx = ROUTING["G14_noise"], TokenContext.of_rows(1, 20_000)
    router = TopKConfig(noise_std=0.3).build(1, 8, dtype=torch.float64)
    noise_TE = router.with_noise(torch.zeros(20_000, 8, dtype=torch.float64), torch.zeros(20_000, 1), ctx)[0]
    assert noise_TE.std().item() / 0.3 == pytest.approx(case["documented_std_factor"], rel=0.01)
    assert noise_TE.std().item() / 0.3 != pytest.approx(case["entrenar_actual_std_factor"], rel=0.1)


@pytest.mark.requirement("G16", "R2-17")
def test_zero_input():
    """G16: equal logits."""
    case, ctx = ROUTING["G16_zero_input"], TokenContext.of_rows(1, 1)
    routing = route_logits(torch.zeros(1, 4, dtype=torch.float64), ctx, top_k=2)
    assert routing.expert_N.tolist() == case["indices"]
    assert routing.gate_N.tolist() == case["gates"][:2]
    assert SwitchConfig().build(4)(routing, dropless(routing, ctx), ctx).item() == case["switch_form"]


@pytest.mark.requirement("G2", "G3")
def test_two_skewed_distributions():
    """G2 and G3: hand values, among them one below 1."""
    for f, P, value in (
        (ROUTING["G2"]["f"], ROUTING["G2"]["P"], ROUTING["G2"]["loss"]),
        (ROUTING["G2"]["imbalanced_f"], ROUTING["G2"]["imbalanced_P"], ROUTING["G2"]["imbalanced_loss"]),
        (ROUTING["G3"]["f"], ROUTING["G3"]["P"], ROUTING["G3"]["loss"]),
    ):
        counts = [round(40 * share) for share in f]
        routing = routing_of([[expert] for expert, times in enumerate(counts) for _ in range(times)], len(f))
        probs_TE = torch.tensor([P] * 40, dtype=torch.float64)
        ctx = TokenContext.of_rows(1, 40)
        routing = dataclasses.replace(routing, probs_TE=probs_TE)
        loss = SwitchConfig().build(len(f))(routing, dropless(routing, ctx), ctx)
        assert loss.item() == pytest.approx(value, abs=1e-12)


def test_G7_a_whole_layer():
    """16 tokens through four equal experts of sine weights, ReLU between."""
    case, ctx = ROUTING["G7_real_forward"], TokenContext.of_rows(1, 16)
    scale = ROUTING["G7_init"]["default_scale1"]
    for name, frequency in (("default_w1_0_0to3", 0.3141), ("default_w2_0_0to3", 0.2718)):
        weight_4 = (frequency * torch.arange(4, dtype=torch.float64)).sin() * scale
        assert weight_4.tolist() == pytest.approx(ROUTING["G7_init"][name], abs=1e-7)
    experts = LoopConfig(hidden_dim=16, activation="relu", bias=True).build(8, 4, dtype=torch.float64)
    with torch.no_grad():
        for weight, frequency in ((experts.up, 0.3141), (experts.down, 0.2718)):
            sine_N = (frequency * torch.arange(128, dtype=torch.float64)).sin() * (2 / 24) ** 0.5
            weight.copy_(sine_N.view(weight.shape[1:]).expand_as(weight))
        experts.up_bias.zero_(), experts.down_bias.zero_()
    plan = plan_capacity(sine_router(16, 8, 4, 0.77, top_k=2), ctx, CapacityConfig(factor=2.0))
    x_TD = (0.77 * torch.arange(128, dtype=torch.float64)).sin().view(16, 8)
    out_TD = DispatchedConfig().build(experts, AllToAllConfig())(x_TD, plan)
    assert out_TD[0].tolist() == pytest.approx(case["out_row0"], abs=1e-6)
    assert out_TD.sum().item() == pytest.approx(case["out_sum"], abs=1e-4)


def counts_of(config: MoEConfig, dim: int) -> dict[str, int]:
    """Parameters of one expert, of all, of the router, and of the layer."""
    layer = config.build(dim, device="meta")
    experts, router = (sum(p.numel() for p in part.parameters()) for part in (layer.bank, layer.router))
    expert = config.experts.expert_parameters(dim)
    assert experts == config.num_experts * expert
    return {"expert": expert, "experts": experts, "router": router, "total": experts + router}


@pytest.mark.requirement("R2-09")
def test_G8_parameter_counts():
    case = ROUTING["G8"]
    settings = {
        "capacity_layer": (64, MoEConfig(8, experts=GroupedConfig(128, "relu", True))),
        "dense_example": (128, MoEConfig(4, TopKConfig(bias=True), experts=GroupedConfig(256, "relu", True))),
        "builder_default": (128, MoEConfig(4, TopKConfig(bias=True), experts=GroupedConfig(512, "relu", True))),
        "transformer_dim768": (768, MoEConfig(8, experts=GroupedConfig(None, "gelu", True))),
    }
    for name, (dim, config) in settings.items():
        counted = counts_of(config, dim)
        assert {key: counted[key] for key in case[name] if key in counted} == {
            key: value for key, value in case[name].items() if key in counted
        }, name
    layer = settings["capacity_layer"][1]
    assert 2 * layer.experts.expert_parameters(64) + 512 == case["capacity_layer"]["active_per_token"]
    router = MLPConfig(hidden_dim=256).build(512, 4, device="meta")
    assert sum(p.numel() for p in router.parameters()) == case["attention_default"]["router"]
