"""Quantile balancing: shortfalls, quantiles from bins, and loads that become even."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigError
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.quantile import QuantileConfig, bin_edges, quantile_of_bins
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoE, MoEConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit, best_groups, shortfall

GROUPS = {
    "none": None,
    "top2 of 4": GroupLimit(4, 2),
    "all experts of the groups": GroupLimit(4, 1),
    "max": GroupLimit(4, 3, "max"),
    "no limit": GroupLimit(4, 4),
}


def scores_of(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    return torch.rand(num_tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_a_shortfall_is_negative_where_chosen_and_only_there(groups):
    score_TE = scores_of(200, 16)
    open_TE = score_TE if groups is None else score_TE.masked_fill(~best_groups(score_TE, groups), -torch.inf)
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, open_TE.topk(4).indices, True)
    assert torch.equal(shortfall(score_TE, 4, groups) < 0, chosen_TE)


def test_shortfalls_by_hand():
    assert shortfall(torch.tensor([[0.9, 0.5, 0.4, 0.1]]), 2, None).tolist() == [pytest.approx([-0.5, -0.1, 0.0, 0.3])]
    # Groups are worth 1.75, 1.5 and 0.84: each expert of the last lacks 0.33, and within its group perhaps more.
    score_TE = torch.tensor([[0.9, 0.85, 0.8, 0.7, 0.84, 0.0]])
    short_TE = shortfall(score_TE, 1, GroupLimit(3, 1))
    assert short_TE.tolist() == [pytest.approx([-0.05, 0.0, 0.05, 0.15, 0.33, 0.85])]
    short_TE = shortfall(score_TE, 1, GroupLimit(3, 1, "max"))
    assert short_TE.tolist() == [pytest.approx([-0.05, 0.0, 0.05, 0.15, 0.01, 0.85], abs=1e-6)]
    assert (shortfall(scores_of(3, 4), 4, None) == -torch.inf).all(), "nothing falls short where all are chosen"


def counted(value_TE: Tensor) -> Tensor:
    edge_B = bin_edges(value_TE.device)
    place_TE = torch.bucketize(value_TE, edge_B)
    return torch.stack([torch.bincount(column, minlength=len(edge_B) + 1) for column in place_TE.t()])


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.3, 5.0])
@pytest.mark.parametrize("num_tokens", [1, 7, 1000])
def test_quantiles_from_bins_are_known_to_a_sixteenth_of_an_octave(scale, num_tokens):
    value_TE = scale * (scores_of(num_tokens, 6) - 0.4)
    got_E = quantile_of_bins(counted(value_TE), torch.tensor(2 * num_tokens))
    exact_E = value_TE.sort(dim=0).values[-(-num_tokens // 3) - 1]
    assert got_E.dtype == torch.float64
    assert ((got_E - exact_E).abs() <= exact_E.abs() * (2 ** (1 / 16) - 1) + 2**-19).all()


def test_quantiles_of_nothing_and_of_what_lies_outside():
    assert quantile_of_bins(counted(torch.zeros(0, 3)), torch.tensor(0)).tolist() == [0, 0, 0]
    far_TE = torch.tensor([[-torch.inf, 100.0]] * 4)
    assert quantile_of_bins(counted(far_TE), torch.tensor(4)).tolist() == [-16.0, 16.0]


def skewed(config: MoEConfig) -> MoE:
    """Experts whose scores differ by far more than tokens do."""
    layer = config.build(8, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.linspace(-2, 2, config.num_experts)
    return layer


def batch(num_tokens: int, seed: int = 0) -> Tensor:
    x_TD = torch.randn(num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x_TD[:, 0] = 2.0
    return x_TD


def max_vios(layer: MoE, batches: list[Tensor]) -> list[float]:
    """MaxVio of each batch in turn, the bias moving after each."""
    found = []
    for x_TD in batches:
        report = layer(x_TD, TokenContext.of_rows(1, x_TD.shape[0])).report
        assert report.observed["quantile"].dtype == torch.int64
        layer.move_bias(report.asked_E, report.observed)
        found.append((report.asked_E.max() / report.asked_E.double().mean() - 1).item())
    assert layer.router.selection_bias.mean().abs() < 1e-6
    return found


@pytest.mark.parametrize(
    ("num_experts", "router", "before", "after"),
    [
        (8, TopKConfig(top_k=1), 5.0, 0.02),
        (8, TopKConfig(top_k=2, score="sigmoid"), 2.5, 0.02),
        (64, TopKConfig(top_k=8), 6.5, 0.05),
        (64, TopKConfig(top_k=8, score="sqrt_softplus"), 6.5, 0.05),
        (16, TopKConfig(top_k=4, score="sigmoid", groups=GroupLimit(4, 2)), 2.5, 0.1),
        (16, TopKConfig(top_k=4, score="sigmoid", groups=GroupLimit(8, 2)), 2.5, 0.1),
        (16, TopKConfig(top_k=2, score="sigmoid", groups=GroupLimit(4, 1, "max")), 5.0, 0.1),
    ],
    ids=lambda value: value.score if isinstance(value, TopKConfig) else None,
)
def test_it_balances_skewed_scores(num_experts, router, before, after):
    """A batch seen again and again: from nearly all on a few experts to nearly even, in 20 steps."""
    config = MoEConfig(num_experts=num_experts, router=router, balance={"quantile": QuantileConfig()})
    vios = max_vios(skewed(config), [batch(4000)] * 20)
    assert vios[0] > before and vios[-1] < after, vios
    assert sum(vios[1:4]) / 3 < vios[0] / 2, "the first steps do most of it"


def test_it_balances_batches_that_it_has_not_seen():
    """Any number of tokens, not the same twice, and one batch without any."""
    config = MoEConfig(num_experts=8, router=TopKConfig(top_k=3), balance={"quantile": QuantileConfig()})
    sizes = [1999, 2001, 1750, 0, 2222, 2003, 1801, 2100, 1900, 2007]
    vios = max_vios(skewed(config), [batch(size, seed) for seed, size in enumerate(sizes)])
    assert vios[0] > 1.5 and max(vios[-3:]) < 0.2


def test_padding_is_not_counted():
    config = MoEConfig(num_experts=8, balance={"quantile": QuantileConfig()})
    layer, x_TD = skewed(config), batch(60)
    ctx = TokenContext.of_rows(3, 20, valid_T=torch.arange(60) % 20 < 13)
    seen = [layer(torch.where(ctx.valid_T[:, None], x_TD, junk), ctx).report.observed["quantile"] for junk in (0, 50)]
    assert torch.equal(*seen) and (seen[0].sum(1) == 39).all()


def test_memory_is_a_moving_average_and_only_training_is_observed():
    x_TD, biases = batch(500), {}
    for memory in (0.0, 0.75):
        layer = skewed(MoEConfig(num_experts=8, balance={"quantile": QuantileConfig(memory)}))
        layer.router.selection_bias.copy_(torch.linspace(-0.2, 0.2, 8))
        before_E = layer.router.selection_bias.double()
        report = layer(x_TD, TokenContext.of_rows(1, 500)).report
        assert layer(x_TD, TokenContext.of_rows(1, 500, training=False)).report.observed == {}
        assert torch.equal(layer.router.selection_bias.double(), before_E), "a forward pass moves nothing"
        layer.move_bias(report.asked_E, report.observed)
        biases[memory] = layer.router.selection_bias.double()
    torch.testing.assert_close(biases[0.75], 0.75 * before_E + 0.25 * biases[0.0], atol=1e-7, rtol=0)
    assert (biases[0.0] - before_E).abs().max() > 0.01


def test_a_dense_layer_has_nothing_to_balance():
    layer = MoEConfig(num_experts=4, router=TopKConfig(mode="dense"), balance={"quantile": QuantileConfig()}).build(
        8, dtype=torch.float64
    )
    assert max_vios(layer, [batch(50)] * 2) == [0.0, 0.0]
    assert (layer.router.selection_bias == 0).all()


@pytest.mark.parametrize("memory", [-0.1, 1.0])
def test_errors(memory):
    with pytest.raises(ConfigError, match=r"is no share. Set it in \[0, 1\)") as caught:
        QuantileConfig(memory)
    assert (caught.value.key, caught.value.value) == ("memory", memory)


@pytest.mark.parametrize("other", [BiasConfig(), QuantileConfig(memory=0.5)])
def test_no_other_rule_beside_it(other):
    with pytest.raises(ConfigError, match="in each step, and other would move it again. Leave one out: ~moe.balance"):
        MoEConfig(balance={"quantile": QuantileConfig(), "other": other})
