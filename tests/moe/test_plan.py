"""Who stays, where, and with which gate."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moedist.config import ConfigError
from moedist.moe.capacity import CapacityConfig, Limit
from moedist.moe.context import TokenContext
from moedist.moe.noise import RANDOM_DROP, draw_uniform
from moedist.moe.plan import count, fill_buckets, plan_capacity
from tests.moe.by_hand import kept, routing_of

pytestmark = pytest.mark.filterwarnings("ignore:moe.capacity.factor")
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "routing.json").read_text())
EXPERTS = [[0, 1], [0, 1], [0, 2], [1, 0]]
GATES = [[0.7, 0.2], [0.6, 0.3], [0.5, 0.4], [0.8, 0.15]]


def plan_of(expert_TK, gate_TK=None, num_experts=3, ctx=None, **config):
    ctx = TokenContext.of_rows(1, len(expert_TK)) if ctx is None else ctx
    return plan_capacity(routing_of(expert_TK, num_experts, gate_TK), ctx, CapacityConfig(**config))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # expert 0 is asked by tokens 0, 1, 2 (first choice) and 3 (second); expert 1 by 0, 1 (second) and 3 (first)
        ("token", [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 2, 0)]),
        ("choice", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (2, 2, 0), (3, 1, 0)]),
        ("probability", [(0, 0, 0), (1, 0, 1), (1, 1, 1), (2, 2, 0), (3, 1, 0)]),
    ],
)
def test_who_stays_by_hand(policy, expected):
    plan = plan_of(EXPERTS, GATES, expert_capacity=2, drop_policy=policy)
    assert kept(plan) == expected
    assert plan.asked_E.tolist() == [4, 3, 1]
    assert plan.kept_E.tolist() == [2, 2, 1]
    assert plan.capacity == 2
    assert (plan.gate_N[plan.slot_N < 0] == 0).all()


def test_random_drop_follows_the_draws():
    ctx = TokenContext.of_rows(1, 40, sample_B=torch.tensor([9]), seed=3, step=5)
    plan = plan_capacity(
        routing_of([[0]] * 40, 2), ctx, CapacityConfig(expert_capacity=7, drop_policy="random"), layer=4
    )
    uniform_T = draw_uniform(ctx, 2, layer=4, stream=RANDOM_DROP)[:, 0].tolist()
    first = sorted(range(40), key=uniform_T.__getitem__)[:7]
    assert kept(plan) == [(token, 0, first.index(token)) for token in sorted(first)]
    assert sorted(first) != list(range(7))


@pytest.mark.pitfall("21")
@pytest.mark.parametrize("policy", ["token", "probability", "choice"])
def test_of_64_equal_tokens_the_first_8_stay(policy):
    """Pitfall 21."""
    plan = plan_of([[1]] * 64, num_experts=2, expert_capacity=8, drop_policy=policy)
    assert kept(plan) == [(token, 1, token) for token in range(8)]


def test_each_sequence_has_its_own_limit():
    ctx = TokenContext.of_rows(2, 3)
    grouped = plan_of([[0]] * 6, ctx=ctx, expert_capacity=2, drop_policy="token", group="sequence")
    assert kept(grouped) == [(0, 0, 0), (1, 0, 1), (3, 0, 2), (4, 0, 3)]
    assert grouped.capacity == 4 and grouped.kept_E.tolist() == [4, 0, 0]
    together = plan_of([[0]] * 6, ctx=ctx, expert_capacity=2, drop_policy="token")
    assert kept(together) == [(0, 0, 0), (1, 0, 1)]


def test_slots_run_through_the_sequences_when_one_is_short():
    ctx = TokenContext.of_rows(3, 2)
    plan = plan_of([[0], [1], [1], [1], [0], [1]], ctx=ctx, expert_capacity=1, drop_policy="token", group="sequence")
    assert kept(plan) == [(0, 0, 0), (1, 1, 0), (2, 1, 1), (4, 0, 1), (5, 1, 2)]


@pytest.mark.requirement("R0-30", "D3")
@pytest.mark.pitfall("16")
def test_padding_takes_no_slot_and_no_share():
    """Pitfall 16."""
    ctx = TokenContext.of_rows(1, 5, valid_T=torch.tensor([False, True, False, True, True]))
    plan = plan_of([[0]] * 5, ctx=ctx, factor=2.0, drop_policy="token")
    # three valid tokens: ceil(2 * 3 * 1 / 3) = 2 of them stay
    assert kept(plan) == [(1, 0, 0), (3, 0, 1)]
    assert plan.asked_E.tolist() == [3, 0, 0] and plan.kept_E.tolist() == [2, 0, 0]
    assert plan.gate_N.tolist() == [0, 1, 0, 1, 0]
    dropless = plan_of([[0]] * 5, ctx=ctx, factor=None)
    assert kept(dropless) == [(1, 0, 0), (3, 0, 1), (4, 0, 2)]


@pytest.mark.parametrize("policy", ["token", "choice", "probability", "random"])
def test_a_batch_of_padding(policy):
    ctx = TokenContext.of_rows(2, 2, valid_T=torch.zeros(4, dtype=torch.bool))
    plan = plan_of(EXPERTS, ctx=ctx, drop_policy=policy, group="sequence")
    assert kept(plan) == [] and plan.asked_E.tolist() == [0, 0, 0]


# The golden's own limit may exceed the tokens; the plan's never does.
@pytest.mark.requirement("R0-28", "G5")
@pytest.mark.pitfall("20")
@pytest.mark.parametrize("case", GOLDEN["G5"], ids=str)
def test_limit_in_exact_arithmetic(case):
    """Pitfall 20."""
    limit = CapacityConfig(factor=case["cf"]).limit(training=True)
    expected = min(case["exact_decimal"], case["tokens"])
    assert limit.of_shape(case["tokens"], case["k"], case["E"]) == expected
    assert limit.of_counts(torch.tensor([case["tokens"]]), case["k"], case["E"]).tolist() == [expected]


@pytest.mark.pitfall("20")
def test_limit_equals_fractions_for_every_small_count():
    """Pitfall 20, as a table: host, device and a fraction say the same."""
    for factor in ("0.1", "0.7", "1", "1.1", "1.15", "1.25", "2.3", "0.000001"):
        limit = CapacityConfig(factor=float(factor)).limit(training=True)
        for num_experts in (1, 3, 10, 64):
            for top_k in (1, 2, 3):
                counts = torch.arange(0, 130)
                expected = [min(t, max(1, -(-Fraction(factor) * t * top_k // num_experts))) for t in counts.tolist()]
                assert limit.of_counts(counts, top_k, num_experts).tolist() == expected
                assert [limit.of_shape(t, top_k, num_experts) for t in counts.tolist()] == expected


@pytest.mark.pitfall("26")
@pytest.mark.parametrize("factor", [4 / 3, 0.1 + 0.2, 1.2345678901234567, 999_999.999999])
def test_long_factors_don_t_overflow(factor):
    """Pitfall 26: the products of 16 digits and 10^6 pairs would not fit in 64 bits."""
    limit = CapacityConfig(factor=factor).limit(training=True)
    share = -(-limit.factor * 2**20 * 8 // 256)
    assert limit.of_counts(torch.tensor([2**20]), 8, 256).tolist() == [min(share, 2**20)]
    assert float(limit.factor) == pytest.approx(factor, rel=1e-8)


def test_four_thirds_is_four_thirds():
    limit = CapacityConfig(factor=4 / 3).limit(training=True)
    assert limit.of_shape(3_000_000, 1, 4) == 1_000_000


@pytest.mark.pitfall("26")
def test_indices_are_int64():
    """Pitfall 26."""
    plan = plan_of(EXPERTS, GATES, factor=1.0)
    for name in ("token_N", "expert_N", "slot_N", "asked_E", "kept_E"):
        assert getattr(plan, name).dtype == torch.int64, name


@pytest.mark.pitfall("19")
@pytest.mark.parametrize("group", ["rank", "sequence"])
@pytest.mark.parametrize("policy", ["token", "choice", "probability", "random"])
def test_a_limit_above_the_tokens_keeps_all(policy, group):
    """Pitfall 19: capacity_factor x k > E, and one token."""
    plan = plan_of([[0, 1]], [[0.6, 0.4]], factor=100.0, drop_policy=policy, group=group)
    assert kept(plan) == [(0, 0, 0), (0, 1, 0)] and plan.capacity == 1
    plan = plan_of(EXPERTS, GATES, factor=4.0, min_capacity=64, drop_policy=policy, group=group)
    assert plan.kept_E.tolist() == plan.asked_E.tolist() and plan.capacity == 4


def test_the_limit_follows_the_valid_tokens():
    valid_T = torch.arange(8) < 3
    plan = plan_of([[0]] * 8, ctx=TokenContext.of_rows(1, 8, valid_T=valid_T), expert_capacity=5)
    assert plan.kept_E.tolist() == [3, 0, 0] and plan.capacity == 5
    assert Limit(Fraction(0), 5).of_counts(torch.tensor([0, 3, 8]), 1, 3).tolist() == [0, 3, 5]


def test_min_capacity():
    for least, stay in ((0, 1), (1, 1), (3, 3)):
        plan = plan_of([[0]] * 4, factor=1e-6, min_capacity=least)
        assert plan.kept_E.tolist() == [stay, 0, 0]


@pytest.mark.requirement("R3-14", "D19")
def test_expert_capacity_overrides_the_factor():
    plan = plan_of([[0]] * 4, factor=None, expert_capacity=2)
    assert plan.kept_E.tolist() == [2, 0, 0]
    assert not CapacityConfig(factor=None, expert_capacity=2).dropless


def test_eval_factor():
    def kept_of(training: bool, **config: object) -> int:
        return plan_of([[0]] * 6, ctx=TokenContext.of_rows(1, 6, training=training), **config).kept_E[0].item()

    assert kept_of(True, factor=1.0) == kept_of(False, factor=1.0) == 2
    assert (kept_of(True, factor=1.0, eval_factor=2.0), kept_of(False, factor=1.0, eval_factor=2.0)) == (2, 4)
    assert (kept_of(True, factor=1.0, eval_factor=None), kept_of(False, factor=1.0, eval_factor=None)) == (2, 6)


def test_what_a_config_says_of_itself():
    assert CapacityConfig(factor=None).dropless and CapacityConfig(factor=None).causal
    assert not CapacityConfig(factor=None, eval_factor=1.0).dropless
    assert CapacityConfig(drop_policy="token", group="sequence").causal
    assert not CapacityConfig(drop_policy="token").causal
    assert not CapacityConfig(drop_policy="probability", group="sequence").causal
    assert CapacityConfig(expert_capacity=3, eval_factor=1.0).without_limit().dropless


@pytest.mark.requirement("C20")
def test_survivors_carry_the_sum_of_all_gates():
    gates = torch.tensor([[0.5, 0.3], [0.4, 0.2], [0.3, 0.1]], dtype=torch.float64)
    plan = plan_of([[0, 1], [0, 1], [0, 2]], gates, expert_capacity=1, drop_policy="token")
    # token 0 keeps both; token 1 loses both; token 2 keeps its second choice only
    assert plan.gate_N.tolist() == pytest.approx([0.5, 0.3, 0, 0, 0, 0.4])
    plain = plan_of(
        [[0, 1], [0, 1], [0, 2]], gates, expert_capacity=1, drop_policy="token", renormalize_after_drop=False
    )
    assert plain.gate_N.tolist() == pytest.approx([0.5, 0.3, 0, 0, 0, 0.1])


@pytest.mark.requirement("C20")
def test_rescaling_keeps_the_gradient_of_one_expert_per_token():
    gate = torch.tensor([[0.5], [0.4]], dtype=torch.float64, requires_grad=True)
    plan = plan_of([[0], [0]], gate, expert_capacity=1, drop_policy="token")
    plan.gate_N.sum().backward()
    assert plan.gate_N.tolist() == [0.5, 0.0]
    assert gate.grad.tolist() == [[1.0], [0.0]]


def test_rescaling_where_nothing_survives_makes_no_nan():
    gate = torch.tensor([[0.5, 0.5], [0.4, 0.6]], dtype=torch.float64, requires_grad=True)
    plan = plan_of([[0, 1], [0, 1]], gate, expert_capacity=1, drop_policy="token")
    plan.gate_N.square().sum().backward()
    assert gate.grad.isfinite().all()


def test_count_and_place():
    index = torch.tensor([2, 0, 2, 2, 0])
    assert count(index, 4).tolist() == [2, 0, 3, 0]
    assert count(index, 4, torch.tensor([True, False, True, False, True])).tolist() == [1, 0, 2, 0]


def test_buckets_are_filled_in_order():
    def filled(bucket_N, order_N):
        return [part.tolist() for part in fill_buckets(torch.tensor(bucket_N), 4, order_N)]

    backwards = torch.tensor([4, 3, 2, 1, 0])
    assert filled([2, 0, 2, 2, 0], None) == [[0, 0, 1, 2, 1], [2, 0, 3, 0]]
    assert filled([2, 0, 2, 2, 0], backwards) == [[2, 1, 1, 0, 0], [2, 0, 3, 0]]
    assert filled([2, -1, 2, -1, 0], backwards) == [[1, -1, 0, -1, 0], [1, 0, 2, 0]]


class Counted(TorchDispatchMode):
    """The operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("factor", [None, 1.0])
def test_pairs_are_counted_once(factor):
    with Counted() as ran:
        plan = plan_of([[0, 1], [0, 2], [0, 1]], factor=factor, drop_policy="token")
    assert plan.asked_E.tolist()[:3] == [3, 2, 1]
    assert ran.names.count("scatter_add_") == 1, ran.names


@pytest.mark.parametrize("policy", ["token", "choice", "probability", "random"])
@pytest.mark.parametrize("group", ["rank", "sequence"])
def test_no_tokens_at_all(policy, group):
    routing = routing_of(torch.zeros(0, 2, dtype=torch.int64), 3)
    plan = plan_capacity(routing, TokenContext.of_rows(0, 4), CapacityConfig(drop_policy=policy, group=group))
    assert plan.slot_N.shape == (0,) and plan.kept_E.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"factor": 0.0}, "factor", "Set it above 0"),
        ({"factor": -1.25}, "factor", "Set it above 0"),
        ({"eval_factor": -1.0}, "eval_factor", "Set it above 0"),
        ({"factor": float("nan")}, "factor", "Set it above 0"),
        ({"factor": float("inf")}, "factor", "null to drop nothing"),
        ({"expert_capacity": 0}, "expert_capacity", "Set it to 1 or more"),
        ({"min_capacity": -1}, "min_capacity", "Set it to 0 or more"),
    ],
)
def test_errors(config, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        CapacityConfig(**config)
    assert caught.value.key == key and repr(config[key]) in str(caught.value)


@pytest.mark.requirement("R0-06")
def test_a_factor_below_1_is_accepted_with_a_warning():
    with pytest.warns(UserWarning, match=r"moe.capacity.factor = 0.5 is below 1"):
        CapacityConfig(factor=0.5)


@pytest.mark.requirement("R3-14", "D19")
def test_a_fixed_capacity_says_what_it_silences():
    """It holds in evaluation too; a factor that would have been another limit is named."""
    with pytest.warns(UserWarning, match=r"expert_capacity = 2 .*: factor = 3.0 and eval_factor = None have no effect"):
        config = CapacityConfig(factor=3.0, eval_factor=None, expert_capacity=2)
    for training in (True, False):
        plan = plan_capacity(routing_of([[0]] * 4, 3), TokenContext.of_rows(1, 4, training=training), config)
        assert plan.kept_E.tolist() == [2, 0, 0]
    with pytest.warns(UserWarning, match=r": final_factor = 2.0 has no effect"):
        CapacityConfig(final_factor=2.0, expert_capacity=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CapacityConfig(expert_capacity=2)
        CapacityConfig(factor=3.0, eval_factor=None)
