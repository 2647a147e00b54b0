"""Switch loss and z-loss: hand values, scopes, shares that add up, and the gradient that reaches the router."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from moedist.config import ConfigError
from moedist.moe.balance.importance import ImportanceConfig, squared_cv
from moedist.moe.balance.load import LoadConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig
from moedist.moe.plan import plan_capacity
from moedist.moe.report import pack_reports
from moedist.moe.router.topk import TopKConfig
from moedist.parallel import spread
from tests.moe.by_hand import dropless, route_logits, routing_of
from tests.ranks import Here

SCOPES = ("global", "micro_batch", "sequence")


def switch(routing, ctx, scope="global", config=None):
    plan = dropless(routing, ctx) if config is None else plan_capacity(routing, ctx, config)
    return SwitchConfig(scope=scope).build(routing.probs_TE.shape[1])(routing, plan, ctx)


def with_probs(routing, probs_TE):
    return dataclasses.replace(routing, probs_TE=torch.as_tensor(probs_TE, dtype=torch.float64))


@pytest.mark.requirement("R0-37")
@pytest.mark.pitfall("10")
def test_hand_value():
    """Pitfall 10: tokens [3, 2, 2, 1] / 8 and mass [.4, .3, .2, .1] give 1.15."""
    routing = with_probs(routing_of([[0]] * 3 + [[1]] * 2 + [[2]] * 2 + [[3]], 4), [[0.4, 0.3, 0.2, 0.1]] * 8)
    for scope in SCOPES:
        assert switch(routing, TokenContext.of_rows(1, 8), scope).item() == pytest.approx(1.15, abs=1e-12)


@pytest.mark.requirement("R0-41")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_experts", [2, 4, 8, 7])
def test_all_on_one_expert_gives_their_number(num_experts, scope):
    routing = with_probs(routing_of([[1]] * 6, num_experts), [[0.0, 1.0] + [0.0] * (num_experts - 2)] * 6)
    assert switch(routing, TokenContext.of_rows(2, 3), scope).item() == pytest.approx(num_experts, abs=1e-12)


@pytest.mark.requirement("R0-40")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_uniform_gives_1_for_any_number_of_choices(top_k, scope):
    """Gate P9."""
    experts = [[(t + k) % 4 for k in range(top_k)] for t in range(8)]
    assert switch(routing_of(experts, 4), TokenContext.of_rows(2, 4), scope).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.requirement("R0-39", "R0-42", "R0-43")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3)])
def test_empty_batch_gives_0_and_a_zero_gradient(shape, scope):
    num_tokens = shape[0] * shape[1]
    logits_TE = torch.randn(num_tokens, 4, dtype=torch.float64, requires_grad=True)
    ctx = TokenContext.of_rows(*shape, valid_T=torch.zeros(num_tokens, dtype=torch.bool))
    routing = route_logits(logits_TE, ctx, top_k=2)
    z_loss = ZLossConfig().build(4)(routing, dropless(routing, ctx), ctx)
    total = switch(routing, ctx, scope) + z_loss
    total.backward()
    assert total.item() == 0 and (logits_TE.grad == 0).all()


@pytest.mark.requirement("R0-38", "C6", "D4")
@pytest.mark.pitfall("11")
def test_counted_before_the_drop():
    """Pitfall 11: at a full expert the loss still says what was asked, and its gradient lives."""
    rows = [[3.0, 1.0, 0.0, 0.0]] * 6 + [[0.0, 3.0, 0.0, 0.0]] * 2
    logits_TE = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    ctx = TokenContext.of_rows(1, 8)
    routing = route_logits(logits_TE, ctx, top_k=1)
    loss = switch(routing, ctx, config=CapacityConfig(factor=1.0))
    # two of six and two of two stay: counted after the drop, both experts would have one half
    mass_E = torch.softmax(logits_TE.detach(), 1).mean(0)
    expected = 4 * (0.75 * mass_E[0] + 0.25 * mass_E[1])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    assert logits_TE.grad.abs().max() > 1e-3


@pytest.mark.requirement("R0-38", "R0-39", "D5")
def test_counts_carry_no_gradient_and_probabilities_do():
    logits_TE = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ctx = TokenContext.of_rows(3, 4)
    routing = route_logits(logits_TE, ctx, top_k=2)
    switch(routing, ctx).backward()
    share_E = torch.bincount(routing.expert_N, minlength=4).double() / 24
    again_TE = logits_TE.detach().requires_grad_()
    (4 * share_E * again_TE.softmax(1).mean(0)).sum().backward()
    torch.testing.assert_close(logits_TE.grad, again_TE.grad, atol=1e-15, rtol=0)


@pytest.mark.requirement("R2-61")
def test_z_loss_by_hand_and_without_padding():
    logits_TE = torch.tensor([[1.0, 2.0], [0.0, 0.0], [7.0, 7.0]], dtype=torch.float64)
    ctx = TokenContext.of_rows(1, 3, valid_T=torch.tensor([True, True, False]))
    routing = route_logits(logits_TE, ctx, top_k=1)
    expected = (torch.tensor([1.0, 2.0]).double().logsumexp(0) ** 2 + torch.log(torch.tensor(2.0).double()) ** 2) / 2
    assert ZLossConfig().build(2)(routing, dropless(routing, ctx), ctx).item() == pytest.approx(expected.item())


@pytest.mark.pitfall("16")
@pytest.mark.parametrize("scope", SCOPES)
def test_padding_changes_no_loss(scope):
    """Pitfall 16."""
    generator = torch.Generator().manual_seed(3)
    logits_TE = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    padded_TE = torch.cat([logits_TE.view(2, 4, 4), torch.randn(2, 3, 4, generator=generator).double()], 1).flatten(
        0, 1
    )
    ctx = TokenContext.of_rows(2, 4)
    padded_ctx = TokenContext.of_rows(2, 7, valid_T=(torch.arange(14) % 7) < 4)
    values = [
        switch(route_logits(logits, c, top_k=2), c, scope).item()
        for logits, c in ((logits_TE, ctx), (padded_TE, padded_ctx))
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_scopes_weigh_their_groups_by_tokens():
    """Two sequences of 3 and 1 valid tokens, each all on one expert: each alone is collapsed, together they are not."""
    probs = [[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3
    valid_T = torch.tensor([True, True, True, True, False, False])
    ctx = TokenContext.of_rows(2, 3, valid_T=valid_T)
    routing = with_probs(routing_of([[0]] * 3 + [[1]] * 3, 2), probs)
    assert switch(routing, ctx, "sequence").item() == pytest.approx(2.0)
    assert switch(routing, ctx, "micro_batch").item() == pytest.approx(2 * (0.75 * 0.75 + 0.25 * 0.25))


@pytest.mark.pitfall("9")
def test_sequence_scope_doesn_t_depend_on_the_cut_of_the_batch():
    """Pitfall 9: rows as one micro-batch or as four, over accumulation and over data-parallel ranks alike."""
    logits_TE = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    valid_T = torch.arange(32) % 8 < torch.tensor([8, 3, 0, 6]).repeat_interleave(8)

    def run(pieces: int) -> tuple[float, torch.Tensor]:
        leaf = logits_TE.clone().requires_grad_()
        total = torch.zeros(())
        for part, valid in zip(leaf.chunk(pieces), valid_T.chunk(pieces), strict=True):
            ctx = TokenContext.of_rows(4 // pieces, 8, valid_T=valid, num_tokens=valid_T.sum())
            routing = route_logits(part, ctx, top_k=2)
            z_loss = ZLossConfig().build(4)(routing, dropless(routing, ctx), ctx)
            total = total + switch(routing, ctx, "sequence") + z_loss
        total.backward()
        return total.item(), leaf.grad

    value, grad = run(1)
    for pieces in (2, 4):
        again = run(pieces)
        assert again[0] == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(again[1], grad, atol=1e-15, rtol=0)


def scoped_gradient(here: Here, scope: str, ep: int) -> tuple[float, torch.Tensor]:
    """Value summed over ranks, and the router's gradient, of the balance loss alone."""
    from moedist.mesh.collectives import all_sum

    mesh = here.mesh_of(ep)
    config = MoEConfig(
        num_experts=4, router=TopKConfig(top_k=2), balance={"switch": SwitchConfig(0.5, scope), "z": ZLossConfig(0.25)}
    )
    layer = config.build(6, dtype=torch.float64)
    table = spread(layer, mesh)
    x_TD = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(here.rank))
    valid_T = torch.arange(12) % 6 < 3 + here.rank % 3
    ctx = TokenContext.of_rows(2, 6, valid_T=valid_T, num_tokens=all_sum(valid_T.sum(), mesh.dp))
    output = layer(x_TD, ctx)
    total = sum(output.report.coefficients[name] * loss for name, loss in output.report.losses.items())
    (total + 0 * output.out_TD.sum()).backward()
    table.sum_copies(layer)
    return all_sum(total.detach(), mesh.dp).item(), layer.router.weight.grad


@pytest.mark.pitfall("9")
@pytest.mark.parametrize("scope", SCOPES)
def test_value_and_gradient_don_t_depend_on_ep(ranks, scope):
    """Pitfall 9, and P9: input gradients equal over layouts."""
    results = [result for ep in (1, 2, 4) for result in ranks(4).run(scoped_gradient, scope, ep)]
    for value, grad in results:
        assert value == pytest.approx(results[0][0], abs=1e-12)
        torch.testing.assert_close(grad, results[0][1], atol=1e-14, rtol=0)
    assert results[0][1].abs().max() > 1e-3


def one_process(scope: str) -> tuple[float, torch.Tensor]:
    """What the four ranks of `scoped_gradient` should say."""
    config = MoEConfig(num_experts=4, router=TopKConfig(top_k=2))
    layer = config.build(6, dtype=torch.float64)
    xs = [torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    valids = [torch.arange(12) % 6 < 3 + r % 3 for r in range(4)]
    num_tokens = torch.cat(valids).sum()
    groups = [(x, v, 2) for x, v in zip(xs, valids, strict=True)]
    if scope == "global":
        groups = [(torch.cat(xs), torch.cat(valids), 8)]
    total = torch.zeros(())
    for x_TD, valid_T, rows in groups:
        ctx = TokenContext.of_rows(rows, 6, valid_T=valid_T, num_tokens=num_tokens)
        routing = layer.router(x_TD, ctx)
        z_loss = ZLossConfig().build(4)(routing, dropless(routing, ctx), ctx)
        total = total + 0.5 * switch(routing, ctx, scope) + 0.25 * z_loss
    total.backward()
    return total.item(), layer.router.weight.grad


@pytest.mark.pitfall("9")
@pytest.mark.parametrize("scope", SCOPES)
def test_ranks_equal_one_process(ranks, scope):
    """Pitfall 9: four data-parallel ranks and one device, for each scope's own groups."""
    value, grad = one_process(scope)
    for got_value, got_grad in ranks(4).run(scoped_gradient, scope, 2):
        assert got_value == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(got_grad, grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_pooled_over_layers(scope):
    """Against the definition: the shares of all layers' pairs, and the mean probability over layers and tokens."""
    generator = torch.Generator().manual_seed(11)
    logits_LTE = torch.randn(3, 12, 4, dtype=torch.float64, generator=generator) * torch.tensor([1, 3, 1, 1.0])
    logits_LTE.requires_grad_()
    ctx = TokenContext.of_rows(3, 4, valid_T=torch.arange(12) % 4 < torch.tensor([4, 3, 1]).repeat_interleave(4))
    config = SwitchConfig(0.5, scope, layers="pooled")
    reports = []
    for logits_TE in logits_LTE:
        layer = MoEConfig(num_experts=4, balance={"switch": config}).build(4, dtype=torch.float64)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(4))
        reports.append(layer(logits_TE, ctx).report)
        assert reports[-1].losses == {}
    objective = pack_reports(reports).objective()
    groups = [ctx.valid_T] if scope != "sequence" else [ctx.valid_T & (ctx.sequence_T == row) for row in range(3)]
    expected = 0.0
    for in_T in groups:
        probs_LTE = logits_LTE[:, in_T].softmax(2)
        count_E = torch.bincount(probs_LTE.topk(2).indices.flatten(), minlength=4)
        loss = 4 * (count_E / count_E.sum() * probs_LTE.mean((0, 1))).sum()
        expected = expected + 0.5 * loss * in_T.sum() / ctx.valid_T.sum()
    assert objective.item() == pytest.approx(expected.item(), abs=1e-7)
    got, wanted = (torch.autograd.grad(value, logits_LTE)[0] for value in (objective, expected))
    torch.testing.assert_close(got, wanted, atol=1e-7, rtol=0)


@pytest.mark.parametrize("config", [SwitchConfig, ImportanceConfig, LoadConfig])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_two_passes_are_for_counts_of_all_ranks(config, scope):
    with pytest.raises(ConfigError, match="counts the whole step.*Set it to running, or scope to global") as caught:
        config(scope=scope, accumulation="two_pass")
    assert caught.value.key == "accumulation"


def test_errors():
    with pytest.raises(ConfigError, match="coefficient = -0.01 rewards imbalance. Set it to 0"):
        SwitchConfig(coefficient=-0.01)


GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "routing.json").read_text())


def six_tokens(top_k: int = 2):
    """G4."""
    ctx = TokenContext.of_rows(1, 6)
    return route_logits(torch.tensor(GOLDEN["G4"]["logits"], dtype=torch.float64), ctx, top_k=top_k), ctx


def test_C5_the_full_softmax():
    """Rescaled weights in the place of P, or gates in the place of both, would give other values."""
    routing, ctx = six_tokens()
    share_E = torch.bincount(routing.expert_N, minlength=4).double() / 12
    gate_TE = torch.zeros(6, 4).double().scatter(1, routing.expert_N.view(6, 2), routing.gate_N.view(6, 2))
    values = {
        "loss_top2_switch": switch(routing, ctx).item(),
        "loss_top2_rescaled_weights": 4 * (share_E * gate_TE.mean(0)).sum().item(),
        "loss_top2_sparse_gates": 4 * gate_TE.mean(0).square().sum().item(),
    }
    for name, value in values.items():
        assert value == pytest.approx(GOLDEN["G4"][name], abs=1e-12), name


@pytest.mark.requirement("C13", "G2")
def test_C7_the_balanced_value_is_1():
    """0.25 for four experts is the product before it is multiplied by their number, and so is a reported 0.253."""
    case, ctx = GOLDEN["G2"], TokenContext.of_rows(1, 8)
    even = routing_of([[token % 4] for token in range(8)], 4)
    assert switch(even, ctx).item() == case["balanced4"] == 4 * case["balanced4_dot"]
    for num_experts in (4, 8):
        probs = [[1.0] + [0.0] * (num_experts - 1)] * 8
        collapsed = with_probs(routing_of([[0]] * 8, num_experts), probs)
        assert switch(collapsed, ctx).item() == case[f"collapse{num_experts}"]
    for prefix in ("", "imbalanced_"):
        assert case[f"{prefix}loss"] == pytest.approx(4 * case[f"{prefix}dot"], abs=1e-12)


@pytest.mark.requirement("R0-40", "G3")
@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_C8_1_is_no_lower_bound(num_experts):
    """N + 1 of 2 N tokens are undecided, and go to the first expert; each other expert has one that is sure of it."""
    undecided, sure = torch.zeros(num_experts + 1, num_experts), 1e4 * torch.eye(num_experts)[1:]
    ctx = TokenContext.of_rows(1, 2 * num_experts)
    loss = switch(route_logits(torch.cat([undecided, sure]).double(), ctx, top_k=1), ctx).item()
    assert loss == pytest.approx(GOLDEN["G3"]["infimum_top1_family"][str(num_experts)], abs=1e-12)
    assert loss == pytest.approx(1 - (num_experts - 1) / (4 * num_experts), abs=1e-12)


@pytest.mark.requirement("G11", "R2-16", "D10", "C15", "R1-14")
def test_D11_the_coefficient_acts_once_on_the_switch_form():
    """Even use gives 0.01, collapse to one of four 0.04; applied twice it would be 0.0001."""
    case, ctx = GOLDEN["G11"], TokenContext.of_rows(1, 8)
    layer = MoEConfig(num_experts=4, balance={"switch": SwitchConfig()}).build(4, dtype=torch.float64)
    collapsed = with_probs(routing_of([[2]] * 8, 4), [[0.0, 0.0, 1.0, 0.0]] * 8)
    for routing, name in ((routing_of([[t % 4] for t in range(8)], 4), "uniform"), (collapsed, "collapse")):
        report = layer.report(routing, dropless(routing, ctx), ctx)
        assert pack_reports([report]).objective().item() == pytest.approx(case[name], abs=1e-12)


@pytest.mark.requirement("G12")
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_D13_equal_counts_have_no_variation(top_k):
    """For any number of choices: counts are compared with their mean, not with the number of tokens."""
    case = GOLDEN["G12"]
    assert squared_cv(torch.tensor([case["counts"]], dtype=torch.float64)).item() == case["value"]
    routing = routing_of([[(t + k) % 4 for k in range(top_k)] for t in range(8)], 4)
    ctx = TokenContext.of_rows(1, 8)
    assert ImportanceConfig().build(4)(routing, dropless(routing, ctx), ctx).item() == case["value"]
