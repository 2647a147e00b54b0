"""Loss-free balancing, importance and load losses, and schedules of coefficients, by hand."""

from __future__ import annotations

import pytest
import torch

from moedist.config import ConfigError
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.importance import ImportanceConfig, squared_cv
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import dropless, route_logits


def moved(config: BiasConfig, bias: list[float], load: list[int]) -> list[float]:
    rule = config.build(len(load))
    result_E = rule(torch.tensor(bias), torch.tensor(load))
    assert result_E.dtype == torch.float32
    return result_E.tolist()


def test_sign_update():
    """mean 4: experts below it rise, one at it stays; then centred."""
    got = moved(BiasConfig(rate=0.1), [0.0, 0.0, 0.0, 0.0], [7, 4, 4, 1])
    assert got == pytest.approx([-0.1, 0.0, 0.0, 0.1])
    got = moved(BiasConfig(rate=0.1), [0.0, 0.2, 0.0, 0.0], [9, 1, 1, 1])
    assert got == pytest.approx([-0.2, 0.2, 0.0, 0.0])
    assert sum(got) == pytest.approx(0, abs=1e-7)


def test_proportional_update():
    got = moved(BiasConfig(rate=0.1, update="proportional"), [0.0] * 4, [8, 4, 4, 0])
    assert got == pytest.approx([-0.1, 0.0, 0.0, 0.1])
    got = moved(BiasConfig(rate=0.1, update="proportional"), [0.0] * 4, [7, 5, 4, 0])
    assert got == pytest.approx([-0.075, -0.025, 0.0, 0.1])


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_no_load_moves_nothing(update):
    assert moved(BiasConfig(update=update), [0.5, -0.5], [0, 0]) == [0.5, -0.5]


@pytest.mark.pitfall("13")
def test_counts_that_bf16_and_fp32_would_confuse():
    """Pitfall 13: 40,960 reads 39,424 in bf16, and 2^24 + 1 reads 2^24 in fp32; the sign must see the difference."""
    base = 2**24
    assert moved(BiasConfig(rate=1.0), [0.0] * 2, [base + 1, base]) == [-1.0, 1.0]
    assert moved(BiasConfig(rate=1.0), [0.0] * 2, [40_960, 40_961]) == [1.0, -1.0]


@pytest.mark.parametrize(("update", "rate"), [("sign", 0.005), ("proportional", 0.02)])
def test_it_balances(update, rate):
    """Skewed scores of 8 experts: the load becomes nearly even, without any gradient."""
    config = MoEConfig(
        num_experts=8, router=TopKConfig(top_k=2, score="sigmoid"), balance={"bias": BiasConfig(rate, update)}
    )
    layer = config.build(4, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.linspace(-1, 1, 8)
    x_TD = torch.randn(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TD[:, 0] = 2.0
    ctx = TokenContext.of_rows(4, 100)
    loads = []
    for _ in range(200):
        report = layer(x_TD, ctx).report
        layer.move_bias(report.asked_E)
        loads.append(report.asked_E)
    assert loads[0].max() > 250 and loads[-1].max() < 115
    assert layer.router.selection_bias.mean().abs() < 1e-6


def test_several_rules_move_the_same_bias_in_turn():
    rules = {"bias": BiasConfig(0.1), "second": BiasConfig(0.1, "proportional")}
    layer = MoEConfig(num_experts=4, balance=rules).build(4)
    layer.move_bias(torch.tensor([8, 4, 4, 0]))
    assert layer.router.selection_bias.tolist() == pytest.approx([-0.2, 0.0, 0.0, 0.2])


@pytest.mark.parametrize(
    ("probs", "expected"), [([1.0, 1.0, 1.0, 1.0], 0.0), ([4.0, 0.0, 0.0, 0.0], 3.0), ([3, 1, 3, 1], 0.25)]
)
def test_squared_variation_by_hand(probs, expected):
    assert squared_cv(torch.tensor([probs], dtype=torch.float64)).tolist() == pytest.approx([expected])


def test_squared_variation_of_nothing():
    assert squared_cv(torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("scope", ["global", "micro_batch", "sequence"])
def test_importance(scope):
    """Mean over groups, weighted by valid tokens; padding has no importance."""
    logits_TE = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid_T = torch.tensor([True] * 4 + [True, True, False, False] + [False] * 4)
    ctx = TokenContext.of_rows(3, 4, valid_T=valid_T)
    routing = route_logits(logits_TE, ctx, top_k=2)
    probs_TE = logits_TE.softmax(1)

    def variation(part_TE):
        total_E = part_TE.sum(0)
        return (total_E.var(correction=0) / total_E.mean() ** 2).item()

    expected = variation(probs_TE[:6])
    if scope == "sequence":
        expected = (4 * variation(probs_TE[:4]) + 2 * variation(probs_TE[4:6])) / 6
    value = ImportanceConfig(scope=scope).build(4)(routing, dropless(routing, ctx), ctx)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.pitfall("10")
def test_schedule_of_a_coefficient():
    """Linear between its ends, constant after them, and applied once (pitfall 10)."""
    config = ZLossConfig(0.1, final_coefficient=0.5, coefficient_steps=4)
    layer = MoEConfig(num_experts=4, balance={"z_loss": config}).build(4)
    for step, expected in ((0, 0.1), (1, 0.2), (2, 0.3), (4, 0.5), (9, 0.5)):
        report = layer(torch.randn(6, 4), TokenContext.of_rows(1, 6, step=step)).report
        assert report.coefficients["z_loss"].item() == pytest.approx(expected, abs=1e-15)


def test_first_choices_only():
    logits_TE = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 3.0, 2.0]], dtype=torch.float64)
    ctx = TokenContext.of_rows(1, 3)
    routing = route_logits(logits_TE, ctx, top_k=2)
    mass_E = logits_TE.softmax(1).mean(0)
    for count, share in (("first", [2 / 3, 1 / 3, 0]), ("all", [2 / 6, 3 / 6, 1 / 6])):
        value = SwitchConfig(count=count).build(3)(routing, dropless(routing, ctx), ctx)
        assert value.item() == pytest.approx(3 * (torch.tensor(share).double() * mass_E).sum().item(), abs=1e-7)


@pytest.mark.parametrize(
    ("make", "key", "said"),
    [
        (lambda: BiasConfig(rate=0.0), "rate", "Set it above 0"),
        (lambda: ImportanceConfig(coefficient=-1.0), "coefficient", r"Set it to 0 \(off\) or more"),
        (lambda: ZLossConfig(final_coefficient=-1.0), "final_coefficient", r"Set it to 0 \(off\) or more"),
        (lambda: SwitchConfig(coefficient_steps=0), "coefficient_steps", "Set 1 or more"),
    ],
)
def test_errors(make, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        make()
    assert caught.value.key == key
