"""Mixtures of attention experts: only routed rows are computed, whoever holds the experts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moedist.config import ConfigError
from moedist.mesh import Mesh
from moedist.model.attention.bank import BankCost, Passes
from moedist.model.attention.experts.contract import Sight
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import AttentionMixture, MixtureConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.init import named_draw
from moedist.moe.router.mlp import MLPConfig
from moedist.parallel import recompute_in_backward, spread
from tests.ranks import Here

B, S, D, H, E = 3, 8, 12, 3, 4


def config_of(**changes: Any) -> MixtureConfig:
    """Four experts, two per query, a limit that drops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a factor below 1 is the point
        values = {
            "num_heads": H,
            "experts": (StandardConfig(),) * E,
            "router": MLPConfig(hidden_dim=6),
            "capacity": CapacityConfig(factor=0.75),
            "balance": {"switch": SwitchConfig(0.3), "z_loss": ZLossConfig(0.2)},
        }
        return MixtureConfig(**{**values, **changes})


def build(config: MixtureConfig, dim: int = D, dtype: torch.dtype = torch.float64) -> AttentionMixture:
    mixture = config.build_mixture(dim, dtype=dtype)
    mixture.init_weights(named_draw(3))
    return mixture


def tokens(rank: int = 0, length: int = S, num_tokens: int | None = None) -> tuple[Tensor, TokenContext, Sight]:
    """Rows of a rank, packed with documents and padding, and what their queries see."""
    draw = torch.Generator().manual_seed(10 + rank)
    x_BSD = torch.randn(B, length, D, dtype=torch.float64, generator=draw)
    document_BS = (torch.rand(B, length, generator=draw) < 0.25).cumsum(1)
    ends_B = torch.tensor([(length, 0, 3), (0, 0, 0), (length, length, 2), (1, 0, 0)][rank % 4])
    valid_BS = torch.arange(length) < ends_B[:, None]
    ctx = TokenContext.of_rows(
        B,
        length,
        valid_T=valid_BS.flatten(),
        sample_B=torch.arange(B) + rank * B,
        num_tokens=None if num_tokens is None else torch.tensor(num_tokens),
    )
    return x_BSD, ctx, Sight(causal=True, document_BS=document_BS, key_valid_BS=valid_BS)


def all_rows_masked(
    mixture: AttentionMixture, x_BQD: Tensor, key_BSD: Tensor, sight: Sight, ctx: TokenContext
) -> Tensor:
    """The oracle: every expert on every row, then the gates."""
    output = mixture(x_BQD, key_BSD, key_BSD, sight, ctx)
    plan = output.plan
    gate_TE = torch.zeros(x_BQD.shape[0] * x_BQD.shape[1], len(mixture.bank.experts), dtype=x_BQD.dtype)
    gate_TE = gate_TE.index_put((plan.token_N, plan.expert_N), plan.gate_N, accumulate=True)
    parts = [expert(x_BQD, key_BSD, key_BSD, sight).out_BQD for expert in mixture.bank.experts.values()]
    mixed = sum(gate_TE[:, e].view(*x_BQD.shape[:2], 1) * part for e, part in enumerate(parts))
    return torch.nn.functional.linear(mixed, mixture.output_weight, mixture.output_bias)


@pytest.mark.requirement("R2-34", "R2-37", "R2-38")
@pytest.mark.parametrize("factor", [None, 0.75, 0.5])
@pytest.mark.parametrize("cross", [False, True])
def test_R2_37_routed_rows_alone_equal_all_rows_masked(factor: float | None, cross: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture = build(config_of(capacity=CapacityConfig(factor=factor)))
    x_BSD, ctx, sight = tokens()
    key_BSD = torch.randn(B, 5, D, dtype=torch.float64) if cross else x_BSD
    sight = Sight() if cross else sight
    results = []
    for run in (lambda: mixture(x_BSD, key_BSD, key_BSD, sight, ctx).out_BQD, None):
        x_BSD.requires_grad_().grad = None
        mixture.zero_grad()
        out = run() if run else all_rows_masked(mixture, x_BSD, key_BSD, sight, ctx)
        out.square().sum().backward()
        results.append((out.detach(), x_BSD.grad, {n: p.grad for n, p in mixture.named_parameters()}))
    (out, x_grad, grads), (expected, expected_x, expected_grads) = results
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x_grad, expected_x, rtol=0, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-12, msg=name)


def test_R2_36_experts_without_rows_are_not_called_and_get_zero_gradients():
    mixture = build(config_of(capacity=CapacityConfig(factor=None)))
    with torch.no_grad():
        mixture.router.bias.copy_(torch.tensor([9.0, -9.0, 8.0, -9.0]))
    calls = []
    for expert, module in mixture.bank.experts.items():
        module.register_forward_hook(lambda *_, expert=expert: calls.append(expert))
    x_BSD, ctx, sight = tokens(2)
    mixture(x_BSD, x_BSD, x_BSD, sight, ctx).out_BQD.sum().backward()
    assert calls == ["0", "2"]
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("bank.experts.1", "bank.experts.3")):
            assert not parameter.grad.any()


@pytest.mark.requirement("R2-57", "C24")
def test_R2_57_cost_follows_routed_rows():
    length, flops = 32, {}
    x_BSD = torch.randn(2, length, D, dtype=torch.float64)
    ctx = TokenContext.of_rows(2, length)
    for top_k in (1, 2, 4):
        capacity = CapacityConfig(expert_capacity=top_k * length // E, group="sequence")
        mixture = build(config_of(router=MLPConfig(hidden_dim=6, top_k=top_k), capacity=capacity))
        with torch.no_grad():  # even routing: each sequence sends as many rows to every expert
            for p in (mixture.router.hidden_weight, mixture.router.hidden_bias, mixture.router.weight):
                p.zero_()
        mixture.router.selection_order = lambda logits_TE, *_: (  # type: ignore[method-assign]
            -((torch.arange(E) - torch.arange(logits_TE.shape[0])[:, None]) % E).to(logits_TE.dtype)
        )
        # The kernel for CPUs is not known to the counter.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = mixture(x_BSD, x_BSD, x_BSD, Sight(causal=True), ctx)
        assert int(output.plan.kept_E.sum()) == 2 * length * top_k
        by_operator = counter.get_flop_counts()["Global"]
        flops[top_k] = sum(n for op, n in by_operator.items() if "bmm" in str(op))
    # Scores and weighted sums: 2 x 2 x rows x S x D each.
    assert flops == {k: 4 * (k * 2 * length) * length * D for k in flops}


@pytest.mark.requirement("R2-06", "R2-39", "C17")
def test_R2_39_weights_come_on_request_and_name_their_experts():
    mixture = build(config_of(capacity=CapacityConfig(factor=None)))
    x_BSD, ctx, sight = tokens()
    assert mixture(x_BSD, x_BSD, x_BSD, sight, ctx).weights is None
    output = mixture(x_BSD, x_BSD, x_BSD, sight, ctx, need_weights=True)
    chosen = set(output.plan.expert_N[output.plan.slot_N >= 0].tolist())
    assert set(output.weights) == chosen
    kept = torch.zeros(B * S, E, dtype=torch.bool)
    live = output.plan.slot_N >= 0
    kept[output.plan.token_N[live], output.plan.expert_N[live]] = True
    for expert, weights in output.weights.items():
        assert weights.shape == (B, H, S, S)
        whole = mixture.bank.experts[str(expert)](x_BSD, x_BSD, x_BSD, sight, need_weights=True).weights_BHQS
        expected = whole * kept[:, expert].view(B, 1, S, 1)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-14)


def test_a_dropped_row_gets_nothing_and_keys_stay():
    mixture = build(config_of(capacity=CapacityConfig(expert_capacity=1, drop_policy="token")))
    x_BSD, ctx, sight = tokens()
    output = mixture(x_BSD, x_BSD, x_BSD, sight, ctx)
    kept_T = torch.zeros(B * S, dtype=torch.bool)
    kept_T[output.plan.token_N[output.plan.slot_N >= 0]] = True
    assert 0 < int(kept_T.sum()) < int(ctx.valid_T.sum())
    assert not (output.out_BQD - mixture.output_bias).flatten(0, 1)[~kept_T].any()


def test_later_tokens_change_nothing_before_them():
    mixture = build(config_of(capacity=CapacityConfig(factor=None)))
    x_BSD = torch.randn(1, S, D, dtype=torch.float64)
    changed = x_BSD.clone()
    changed[:, 5:] += 1
    outputs = [mixture(x, x, x, Sight(causal=True), TokenContext.of_rows(1, S)).out_BQD for x in (x_BSD, changed)]
    difference_S = (outputs[0] - outputs[1]).abs().amax((0, 2))
    assert difference_S[:5].max() <= 1e-14 and difference_S[5:].min() > 1e-3


def test_an_empty_batch_and_no_valid_token():
    mixture = build(config_of())
    empty = torch.zeros(0, S, D, dtype=torch.float64)
    assert mixture(empty, empty, empty, Sight(), TokenContext.of_rows(0, S)).out_BQD.shape == (0, S, D)
    x_BSD, ctx, sight = tokens(1)
    mixture(x_BSD, x_BSD, x_BSD, sight, ctx).out_BQD.sum().backward()
    assert all(p.grad is not None for p in mixture.parameters())


def test_R2_04_mixtures_travel():
    mixture = build(config_of())
    x_BSD, ctx, sight = tokens()
    expected = mixture(x_BSD, x_BSD, x_BSD, sight, ctx).out_BQD
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert torch.equal(twin(x_BSD, x_BSD, x_BSD, sight, ctx).out_BQD, expected)


# Over ranks


def task_loss(out_BQD: Tensor, ctx: TokenContext, num_tokens: int) -> Tensor:
    weight_TD = torch.linspace(0.5, 1.5, out_BQD.numel(), dtype=torch.float64).view(-1, D)
    return ((out_BQD.flatten(0, 1) * weight_TD).square() * ctx.valid_T[:, None]).sum() / num_tokens


def run_step(mixture: AttentionMixture, rank: int, world: int, scope: str) -> Tensor:
    """Forward and backward of two micro-batches of a rank; returns the outputs."""
    total = sum(int(tokens(r + world * m)[1].valid_T.sum()) for r in range(world) for m in range(2))
    outputs = []
    for micro in range(2):
        x_BSD, ctx, sight = tokens(rank + world * micro, num_tokens=total)
        output = mixture(x_BSD, x_BSD, x_BSD, sight, ctx)
        losses = sum(output.report.coefficients[name] * loss for name, loss in output.report.losses.items())
        (task_loss(output.out_BQD, ctx, total) + losses).backward()
        outputs.append(output.out_BQD.detach())
    return torch.stack(outputs)


def cases(kinds: tuple[Any, ...]) -> list[tuple[MixtureConfig, str]]:
    return [
        (
            config_of(
                bank=bank,
                experts=kinds,
                capacity=CapacityConfig(factor=factor, group=group),
                balance={"switch": SwitchConfig(0.3, "micro_batch"), "z_loss": ZLossConfig(0.2)},
            ),
            recompute,
        )
        for bank in ("replicated", "gathered")
        for factor, group in ((1.0, "rank"), (1.0, "sequence"), (None, "rank"))
        for recompute in ("none", "full", "selective")
    ]


def equal_one_device(here: Here, ep: int, kinds: tuple[Any, ...]) -> float:
    """Worst difference of outputs and gradients from one process that runs all ranks' micro-batches."""
    worst, mesh = 0.0, here.mesh_of(ep)
    for config, recompute in cases(kinds):
        mixture = build(config)
        reference = build(dataclasses.replace(config, bank="replicated"))
        table = spread(mixture, mesh)
        assert mixture.bank.sharded == (config.bank == "gathered" and ep > 1)
        if mixture.bank.sharded:
            assert mixture.bank.expert_ids == tuple(range(E))[mesh.ep.rank * E // ep : (mesh.ep.rank + 1) * E // ep]
        if recompute != "none":
            recompute_in_backward(mixture, recompute)
        out = run_step(mixture, here.rank, here.world, "micro_batch")
        table.sum_copies(mixture)
        expected = torch.stack([run_step(reference, rank, here.world, "micro_batch") for rank in range(here.world)])
        worst = max(worst, (out - expected[here.rank]).abs().max().item())
        references = dict(reference.named_parameters())
        for name, parameter in mixture.named_parameters():
            assert parameter.grad is not None, name
            worst = max(worst, (parameter.grad - references[name].grad).abs().max().item())
    return worst


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow), (1, 1)])
def test_ranks_equal_one_device(ranks: Any, world: int, ep: int):
    kinds = (StandardConfig(),) * E
    assert max(ranks(world).run(equal_one_device, ep, kinds)) <= 1e-12


def other_types_and_frozen_weights(here: Here) -> None:
    """Changed types reach the experts that are gathered; a rank whose experts are frozen hears of the others'."""
    results = []
    for late in (False, True):
        mixture = build(config_of(bank="gathered"), dtype=torch.float32)
        if late:
            spread(mixture, here.mesh_of(2))
        mixture.double()
        if not late:
            spread(mixture, here.mesh_of(2))
        for name, parameter in mixture.named_parameters():
            parameter.requires_grad_(name.startswith("bank.experts.3"))
        x_BSD, ctx, sight = tokens(2)
        mixture(x_BSD, x_BSD, x_BSD, sight, ctx).out_BQD.square().sum().backward()
        results.append([p.grad for p in mixture.parameters() if p.requires_grad])
    assert len(results[0]) == 3 * here.rank and all(grad.dtype == torch.float64 for grad in results[0])
    reference = build(config_of(), dtype=torch.float32).double()
    x_BSD, ctx, sight = tokens(2)
    (2 * reference(x_BSD, x_BSD, x_BSD, sight, ctx).out_BQD.square().sum()).backward()
    expected = [p.grad for p in reference.bank.experts["3"].parameters()] if here.rank else []
    for grads in results:
        torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_other_types_and_frozen_weights(ranks: Any):
    ranks(2).run(other_types_and_frozen_weights)


def test_the_cheaper_bank_is_chosen_and_says_why():
    once = BankCost(12_000_000, 4, Passes())
    assert once.gathered_elements == once.replicated_elements == 18_000_000
    assert once.choose("auto") == (
        "gathered",
        "per step and layer gathered sends 18.00 M elements, replicated 18.00 M, and gathered keeps 1/4 of the experts "
        "on a rank",
    )
    assert BankCost(12, 4, Passes(micro_steps=2)).choose("auto")[0] == "replicated"
    assert BankCost(12, 4, Passes(recomputed=True)).choose("auto")[0] == "replicated"
    assert BankCost(12, 4, Passes(micro_steps=9)).choose("gathered")[0] == "gathered"
    assert BankCost(12, 1, Passes()).choose("gathered")[0] == "replicated"
    assert BankCost(12, 4, Passes(), "they must").choose("auto") == ("replicated", "they must")


def test_bad_input_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="top_k = 5 is more than the 4 experts"):
        config_of(router=MLPConfig(top_k=5))
    with pytest.raises(ConfigError, match="num_heads = 3 does not divide dim = 10"):
        config_of().build_mixture(10)
    with pytest.raises(ConfigError, match="bank = 'gathered' cannot cut 4 attention experts into 3 equal parts"):
        config_of(bank="gathered").check_ep(3)
    with pytest.raises(ConfigError, match="gives each rank other parameters, and it must not"):
        config_of(bank="gathered").check_ep(2, "it must not")
    with pytest.raises(ConfigError, match="lists no expert"):
        config_of(experts=())
    assert Mesh.alone().ep.size == 1
