"""Banks: the plain one, the dispatched one, and experts that a reader can multiply in his head."""

from __future__ import annotations

import pytest
import torch

from moedist.config import ConfigError
from moedist.mesh import Axis
from moedist.moe.bank.dispatched import DispatchedConfig
from moedist.moe.bank.local import LocalConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import plan_capacity
from tests.moe.by_hand import ScalingExperts, dropless, routing_of
from tests.ranks import Here

BANKS = {
    "local": (LocalConfig(), AllToAllConfig()),
    "all_to_all": (DispatchedConfig(), AllToAllConfig()),
    "padded": (DispatchedConfig(), PaddedConfig()),
}
NUM_EXPERTS = 4


def random_plan(seed, top_k, factor, num_tokens=20):
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k]
    gate_TK = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64).requires_grad_()
    valid_T = torch.rand(num_tokens, generator=generator) < 0.9
    ctx = TokenContext.of_rows(4, num_tokens // 4, valid_T=valid_T)
    plan = plan_capacity(routing_of(expert_TK, NUM_EXPERTS, gate_TK), ctx, CapacityConfig(factor=factor))
    x_TD = torch.randn(num_tokens, 3, dtype=torch.float64, generator=generator).requires_grad_()
    return x_TD, gate_TK, plan


def expected_factor(plan, num_tokens, scaled):
    """Sum over a token's kept pairs of gate x (expert + 1), or of the gates."""
    factor_N = plan.gate_N * ((plan.expert_N + 1) if scaled else 1)
    return torch.zeros(num_tokens, dtype=torch.float64).index_add(0, plan.token_N, factor_N)


@pytest.mark.requirement("D6")
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("identity", [True, False])
def test_identity_and_scaling_experts(identity, top_k, factor, bank):
    """Gates P6 and P7: the output is the input times a number known from the plan, and so is the gradient."""
    x_TD, gate_TK, plan = random_plan(top_k, top_k, factor)
    config, dispatch = BANKS[bank]
    out_TD = config.build(ScalingExperts(NUM_EXPERTS, identity), dispatch)(x_TD, plan)
    factor_T = expected_factor(plan, 20, scaled=not identity)
    torch.testing.assert_close(out_TD, x_TD * factor_T[:, None], atol=1e-14, rtol=0)
    weight_TD = torch.linspace(1, 2, 60, dtype=torch.float64).view(20, 3)
    x_grad, gate_grad = torch.autograd.grad((out_TD * weight_TD).sum(), (x_TD, gate_TK), retain_graph=True)
    torch.testing.assert_close(x_grad, (weight_TD * factor_T[:, None]).detach(), atol=1e-14, rtol=0)
    (expected,) = torch.autograd.grad(((x_TD * factor_T[:, None]) * weight_TD).sum(), gate_TK)
    torch.testing.assert_close(gate_grad, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("bank", BANKS)
def test_one_choice_with_gate_1_gives_the_input_to_the_bit(bank):
    """Gate P6, dropless, K = 1."""
    config, dispatch = BANKS[bank]
    x_TD = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = dropless(routing_of([[t % 3] for t in range(12)], NUM_EXPERTS, [[1.0]] * 12), TokenContext.of_rows(1, 12))
    assert torch.equal(config.build(ScalingExperts(NUM_EXPERTS, identity=True), dispatch)(x_TD, plan), x_TD)


@pytest.mark.requirement("R0-36")
@pytest.mark.parametrize("bank", BANKS)
def test_a_token_without_a_kept_pair_gives_zero(bank):
    config, dispatch = BANKS[bank]
    ctx = TokenContext.of_rows(1, 3)
    plan = plan_capacity(routing_of([[0]] * 3, NUM_EXPERTS), ctx, CapacityConfig(expert_capacity=1))
    out_TD = config.build(ScalingExperts(NUM_EXPERTS), dispatch)(torch.ones(3, 2).double(), plan)
    assert out_TD.tolist() == [[1, 1], [0, 0], [0, 0]]


def bank_out(here: Here, ep: int, kind: str, case: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's output over its input with scaling experts, and what its plan says."""
    mesh = here.mesh_of(ep)
    config, dispatch = BANKS[kind]
    bank = config.build(ScalingExperts(NUM_EXPERTS), dispatch)
    bank.spread(Placement.in_order(NUM_EXPERTS, ep), mesh.ep)
    x_TD, _, plan = random_plan(100 * here.rank + case, 2, (1.0, None)[case % 2])
    return bank(x_TD, plan).detach() / x_TD.detach(), expected_factor(plan, 20, scaled=True).detach()


@pytest.mark.parametrize("kind", ["all_to_all", "padded"])
@pytest.mark.parametrize("ep", [2, 4])
def test_scaling_experts_over_ranks(ranks, ep, kind):
    """Gate P7: every row found its own expert and came home."""
    for case in range(2):
        for got_TD, expected_T in ranks(4).run(bank_out, ep, kind, case):
            torch.testing.assert_close(got_TD, expected_T[:, None].expand_as(got_TD), atol=1e-12, rtol=0)


def test_a_local_bank_is_for_one_rank():
    bank = LocalConfig().build(ScalingExperts(4), AllToAllConfig())
    bank.spread(Placement.in_order(4, 1), Axis("ep"))
    with pytest.raises(
        ConfigError, match="kind = 'local' keeps all experts .* over 2. Set moe.bank.kind to dispatched"
    ):
        LocalConfig().check_spread(2)
    DispatchedConfig().check_spread(2)
