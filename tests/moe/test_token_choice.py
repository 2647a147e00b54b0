"""What token-choice routers share: scores, groups, selection bias, dense mode, jitter."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.config import ConfigError
from moedist.mesh.nodes import nodes_per_ep_group
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.init import named_draw
from moedist.moe.layer import MoEConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import plan_capacity
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit
from tests.moe.by_hand import dropless, route_by, route_logits


def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        ("softmax", lambda row: [math.exp(x) / sum(map(math.exp, row)) for x in row]),
        ("sigmoid", lambda row: [1 / (1 + math.exp(-x)) for x in row]),
        ("sqrt_softplus", lambda row: [math.sqrt(math.log(1 + math.exp(x))) for x in row]),
    ],
)
def test_scores(score, formula):
    """The gate is the score; the full distribution of scores that don't sum to 1 is normalised for balance losses."""
    row = [2.1, -0.5, 1.3, 0.8]
    expected = formula(row)
    for top_k, renormalize, scale in ((2, False, 1.0), (2, True, 2.5), (1, None, 1.0)):
        routing = route_logits(
            torch.tensor([row], dtype=torch.float64),
            TokenContext.of_rows(1, 1),
            score=score,
            top_k=top_k,
            renormalize=renormalize,
            scale=scale,
        )
        chosen = [0, 2][:top_k]
        total = sum(expected[e] for e in chosen) if renormalize else 1.0
        assert routing.expert_N.tolist() == chosen
        assert routing.gate_N.tolist() == pytest.approx([scale * expected[e] / total for e in chosen], abs=1e-14)
        assert routing.score_TE[0].tolist() == pytest.approx(expected, abs=1e-14)
        assert routing.probs_TE[0].tolist() == pytest.approx([s / sum(expected) for s in expected], abs=1e-14)


@pytest.mark.parametrize("score", ["top2_sum", "max"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_groups", "top_groups", "top_k"), [(4, 2, 3), (2, 1, 2), (4, 4, 5), (6, 1, 2)])
def test_group_limited_selection_equals_a_plain_loop(score, biased, num_groups, top_groups, top_k):
    size = 12 // num_groups
    logits_TE = random_logits(40, 12)
    bias_E = 0.3 * random_logits(1, 12, seed=1)[0].float() if biased else None
    config = TopKConfig(top_k=top_k, score="sigmoid", groups=GroupLimit(num_groups, top_groups, score))
    routing = route_by(config, logits_TE, TokenContext.of_rows(1, 40), bias_E)
    for token, row in enumerate((logits_TE.sigmoid() + (0 if bias_E is None else bias_E)).tolist()):
        worth = []
        for group in range(num_groups):
            best = sorted(row[group * size : (group + 1) * size], reverse=True)
            worth.append(best[0] + best[1] if score == "top2_sum" else best[0])
        allowed = sorted(range(num_groups), key=lambda g: -worth[g])[:top_groups]
        experts = [e for e in range(12) if e // size in allowed]
        expected = sorted(experts, key=lambda e: -row[e])[:top_k]
        assert routing.expert_N.view(40, top_k)[token].tolist() == expected


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize(("ep", "ranks_per_node"), [(4, 1), (4, 2), (8, 2), (8, 4)])
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_a_token_is_computed_on_at_most_top_groups_nodes(ep, ranks_per_node, overflow, data):
    """The bound on traffic between nodes, counted where the placement puts the experts, overflow included."""
    num_nodes = nodes_per_ep_group(ep, ranks_per_node)
    each, top_groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, num_nodes))
    num_experts = ep * each
    top_k = data.draw(st.integers(1, num_experts // num_nodes * top_groups))
    groups = GroupLimit(num_nodes, top_groups, "max", per_node=True)
    layer = MoEConfig(num_experts=num_experts, router=TopKConfig(top_k=top_k, groups=groups)).build(4).double()
    x_TD = torch.randn(
        40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    ctx = TokenContext.of_rows(4, 10)
    routing = layer.router(x_TD, ctx)
    plan = plan_capacity(routing, ctx, CapacityConfig(factor=1.0, overflow=overflow))
    rank_E = torch.tensor(
        [rank for rank, ids in enumerate(Placement.in_order(num_experts, ep).expert_ids) for _ in ids]
    )
    for expert_N, there_N in ((routing.expert_N, routing.token_N >= 0), (plan.expert_N, plan.slot_N >= 0)):
        node_N = rank_E[expert_N] // ranks_per_node
        visits = {
            (t, n) for t, n, there in zip(routing.token_N.tolist(), node_N.tolist(), there_N, strict=True) if there
        }
        assert max(sum(t == token for t, _ in visits) for token in range(40)) <= top_groups


@pytest.mark.pitfall("24")
def test_equal_groups_go_to_the_lowest_index():
    """Pitfall 24."""
    config = TopKConfig(top_k=2, groups=GroupLimit(4, 2))
    routing = route_by(config, torch.zeros(3, 8, dtype=torch.float64), TokenContext.of_rows(1, 3))
    assert routing.expert_N.view(3, 2).tolist() == [[0, 1]] * 3


def test_the_bias_selects_and_never_weighs():
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    ctx = TokenContext.of_rows(1, 1)
    bias_E = torch.tensor([0.0, 0.0, 0.0, 1.0])
    routing = route_by(TopKConfig(top_k=2, score="sigmoid", renormalize=False), logits_TE, ctx, bias_E)
    plain = route_by(TopKConfig(top_k=2, score="sigmoid", renormalize=False), logits_TE, ctx)
    assert routing.expert_N.tolist() == [3, 0] and plain.expert_N.tolist() == [0, 1]
    assert routing.gate_N.tolist() == logits_TE.sigmoid()[0, [3, 0]].tolist()
    assert torch.equal(routing.score_TE, plain.score_TE) and torch.equal(routing.probs_TE, plain.probs_TE)


@pytest.mark.pitfall("13", "14")
def test_the_bias_stays_in_fp32_and_is_saved():
    """Pitfalls 13 and 14: through a cast of the model, the meta device, and a save and a load."""
    config = MoEConfig(num_experts=4, balance={"bias": BiasConfig()})
    layer = config.build(8)
    values_E = torch.tensor([1e-3, -2e-3, 3.0001, -2.9991])
    layer.router.selection_bias.copy_(values_E)
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.selection_bias.dtype == torch.float32
    assert torch.equal(layer.router.selection_bias, values_E)
    state = layer.state_dict()
    assert torch.equal(state["router.selection_bias"], values_E)
    other = config.build(8, device="meta").bfloat16().to_empty(device="cpu")
    assert other.router.selection_bias.dtype == torch.float32
    other.init_weights(named_draw(0))
    assert (other.router.selection_bias == 0).all()
    other.load_state_dict(state)
    assert torch.equal(other.router.selection_bias, values_E)
    assert "selection_bias" not in dict(other.router.named_parameters()), "no gradient, no optimizer"


def test_without_a_rule_there_is_no_bias():
    assert MoEConfig(num_experts=4).build(8).router.selection_bias is None
    assert not [name for name in MoEConfig(num_experts=4).build(8).state_dict() if "bias" in name]


def test_dense_mode_runs_every_expert_with_its_probability():
    logits_TE = random_logits(5, 4)
    routing = route_logits(logits_TE, TokenContext.of_rows(1, 5), mode="dense")
    assert routing.pairs_per_token == 4 and routing.expert_N.view(5, 4).sort(1).values.tolist() == [[0, 1, 2, 3]] * 5
    got_TE = torch.zeros(5, 4).double().scatter(1, routing.expert_N.view(5, 4), routing.gate_N.view(5, 4))
    torch.testing.assert_close(got_TE, logits_TE.softmax(1), atol=1e-14, rtol=0)
    assert TopKConfig(mode="dense").experts_per_token(64) == 64


@pytest.mark.requirement("C21")
def test_no_choices_are_another_way_to_say_dense():
    logits_TE, ctx = random_logits(5, 4), TokenContext.of_rows(1, 5)
    zero, dense = (route_logits(logits_TE, ctx, **config) for config in ({"top_k": 0}, {"mode": "dense"}))
    assert torch.equal(zero.expert_N, dense.expert_N) and torch.equal(zero.gate_N, dense.gate_N)
    config = TopKConfig(top_k=0)
    assert (config.mode, config.experts_per_token(64)) == ("dense", 64)
    assert dataclasses.replace(config, mode="top_k", top_k=3).experts_per_token(64) == 3


@pytest.mark.pitfall("27")
def test_jitter_touches_the_router_s_own_copy_only():
    """Pitfall 27: inputs, the experts' rows and evaluation are as without; the router's logits are not."""
    layers = [
        MoEConfig(num_experts=4, router=TopKConfig(top_k=4, input_jitter=jitter), balance={}).build(8)
        for jitter in (0.0, 0.3)
    ]
    x_TD = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    before, seen = x_TD.clone(), []
    for layer in layers:
        layer.bank.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    plain, jittered = (layer(x_TD, TokenContext.of_rows(1, 6)) for layer in layers)
    assert torch.equal(x_TD, before) and torch.equal(seen[0], seen[1]) and torch.equal(seen[1], before)
    assert not torch.equal(plain.out_TD, jittered.out_TD)
    quiet = [layer(x_TD, TokenContext.of_rows(1, 6, training=False)).out_TD for layer in layers]
    assert torch.equal(*quiet)


def test_jitter_is_uniform_around_one():
    router = TopKConfig(top_k=1, score="sigmoid", input_jitter=0.2).build(1, 1, dtype=torch.float64)
    torch.nn.init.ones_(router.weight)
    routing = router(torch.ones(20_000, 1, dtype=torch.float64), TokenContext.of_rows(1, 20_000))
    factor_T = routing.score_TE[:, 0].logit()
    assert 0.8 <= factor_T.min() < 0.81 and 1.19 < factor_T.max() <= 1.2
    assert factor_T.mean().item() == pytest.approx(1, abs=5e-3)
    assert factor_T.std().item() == pytest.approx(0.4 / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("noise", [{"input_jitter": 0.3}, {"noise_std": 2.0}, {"input_jitter": 0.3, "noise_std": 2.0}])
def test_the_z_loss_sees_logits_without_noise(noise):
    """Selection, gates and probabilities are noisy; the raw logits, and the z-loss with its gradient, are not."""
    x_TD, ctx = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), TokenContext.of_rows(1, 6)
    z_loss, found = ZLossConfig().build(4), []
    for config in (TopKConfig(top_k=2), TopKConfig(top_k=2, **noise)):
        router = config.build(8, 4)
        router.init_weights(named_draw(0))
        routing = router(x_TD, ctx)
        loss = z_loss(routing, dropless(routing, ctx), ctx)
        loss.backward()
        found.append((loss, router.weight.grad, routing))
    (loss, grad, routing), (noisy_loss, noisy_grad, noisy_routing) = found
    assert torch.equal(noisy_loss, loss) and torch.equal(noisy_grad, grad)
    assert torch.equal(noisy_routing.logits_TE, routing.logits_TE)
    assert not torch.equal(noisy_routing.probs_TE, routing.probs_TE)


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"groups": GroupLimit(5, 1)}, "router.groups.num_groups", "does not divide the 8 experts"),
        ({"groups": GroupLimit(4, 1), "top_k": 3}, "router.groups.top_groups", "leaves 2 experts for top_k = 3"),
        ({"groups": GroupLimit(8, 2), "top_k": 2}, "router.groups.score", "Set it to max"),
        ({"mode": "top_k", "top_k": 9}, "router.top_k", "Set moe.router.top_k to 8 or less"),
    ],
)
def test_what_does_not_fit_the_experts(config, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        MoEConfig(num_experts=8, router=TopKConfig(**config))
    assert caught.value.key == key and str(caught.value.value) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "key", "said"),
    [
        (lambda: GroupLimit(0, 1), "num_groups", "Set it to 1 or more"),
        (lambda: GroupLimit(4, 5), "top_groups", "Set it to 1 to 4"),
        (lambda: TopKConfig(scale=0.0), "scale", "Set it above 0"),
        (lambda: TopKConfig(input_jitter=1.0), "input_jitter", r"Set it in \[0, 1\)"),
        (lambda: TopKConfig(top_k=-1), "top_k", "or mode to dense"),
    ],
)
def test_errors(make, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        make()
    assert caught.value.key == key
