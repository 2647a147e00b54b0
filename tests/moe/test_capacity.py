"""The limit by the public formulas, its schedule, and where a pair goes when its expert is full."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.config import ConfigError
from moedist.moe.capacity import CapacityConfig, Limit
from moedist.moe.context import TokenContext
from moedist.moe.plan import plan_capacity
from tests.moe.by_hand import kept, preset_config, route_logits, routing_of

pytestmark = pytest.mark.filterwarnings("ignore:moe.capacity")
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "routing.json").read_text())
SIZES = [(1, 4), (7, 4), (8, 8), (100, 10), (100, 7), (257, 16), (4096, 64), (8192, 160)]
# What each project's own code says: tokens, experts, factor -> slots of an expert; theirs may exceed the tokens.
PUBLIC = {
    "default": lambda t, e: max(1, math.ceil(Fraction("1.25") * 2 * t / e)),
    "switch": lambda t, e: max(1, math.ceil(Fraction("1.25") * t / e)),
    "gshard": lambda t, e: max(1, math.ceil(Fraction(2) * t / e)),
    "deepspeed_top2": lambda t, e: max(4, int(np.ceil(np.float32(t / e) * np.float32(1.0 * 2)))),
    "megatron": lambda t, e: max(1, math.ceil(t * 2 / e * 1.0)),
    "st_moe": lambda t, e: max(1, int(t * 1.25 / e)),
}


def both(limit: Limit, num_tokens: int, top_k: int, num_experts: int, step: int = 0) -> int:
    """The limit on the device, which the one from the shape must never be below."""
    (value,) = limit.of_counts(torch.tensor([num_tokens]), top_k, num_experts, torch.tensor(step)).tolist()
    assert value <= limit.of_shape(num_tokens, top_k, num_experts)
    return value


@pytest.mark.requirement("R3-13", "C19")
@pytest.mark.pitfall("20")
@pytest.mark.parametrize("name", PUBLIC)
def test_public_formulas(name):
    """Pitfall 20: each preset's keys say what its project computes."""
    moe = preset_config(name)
    limit = moe.capacity.limit(training=True)
    for num_tokens, num_experts in SIZES:
        expected = min(num_tokens, PUBLIC[name](num_tokens, num_experts))
        assert both(limit, num_tokens, moe.router.top_k, num_experts) == expected
        assert limit.of_shape(num_tokens, moe.router.top_k, num_experts) == expected


@pytest.mark.requirement("R0-28", "G5")
@pytest.mark.parametrize("case", GOLDEN["G5"], ids=str)
def test_roundings(case):
    columns = {"ceil": "exact_decimal", "ceil_float32": "megatron_ds", "floor": "mesh_floor"}
    for rounding, column in columns.items():
        limit = CapacityConfig(factor=case["cf"], rounding=rounding, min_capacity=0).limit(training=True)
        expected = min(case[column], case["tokens"])
        assert both(limit, case["tokens"], case["k"], case["E"]) == expected, rounding


@pytest.mark.requirement("R3-13")
def test_base_tokens_leaves_out_the_number_of_choices():
    for base, expected in (("pairs", 50), ("tokens", 25)):
        assert both(CapacityConfig(factor=2.0, base=base).limit(True), 100, 2, 8) == expected


def test_schedule():
    """From 1 to 2 in 100 steps: at 0, in the middle, at the end and after it, in exact arithmetic."""
    config = CapacityConfig(factor=1.0, final_factor=2.0, factor_steps=100)
    limit = config.limit(training=True)
    for step, expected in ((0, 25), (1, 26), (50, 38), (99, 50), (100, 50), (5000, 50)):
        assert expected == math.ceil(25 * min(Fraction(100 + step, 100), 2))
        assert both(limit, 100, 1, 4, step) == expected
    assert limit.of_shape(100, 1, 4) == 50, "buffers hold the largest limit of the schedule"
    down = CapacityConfig(factor=2.0, final_factor=0.1, factor_steps=3).limit(training=True)
    assert [both(down, 60, 1, 4, step) for step in range(4)] == [30, 21, 11, 2]
    floor = CapacityConfig(factor=2.0, final_factor=0.1, factor_steps=3, rounding="floor").limit(training=True)
    assert [both(floor, 60, 1, 4, step) for step in range(4)] == [30, 20, 11, 1]


def test_schedule_and_evaluation():
    config = CapacityConfig(factor=1.0, final_factor=2.0, eval_factor=1.5)
    assert config.limit(training=False).final is None and config.limit(training=False).factor == Fraction("1.5")
    assert CapacityConfig(factor=1.0, final_factor=2.0).limit(training=False).final == 2
    assert config.without_limit().dropless


@pytest.mark.pitfall("26")
def test_a_long_schedule_doesn_t_overflow():
    """Pitfall 26."""
    limit = CapacityConfig(factor=4 / 3, final_factor=999.999, factor_steps=10**6).limit(training=True)
    factor = Fraction("1.333") + (Fraction("999.999") - Fraction("1.333")) * 999_999 / 10**6
    assert both(limit, 2**20, 8, 2**14, 999_999) == min(2**20, math.ceil(factor * 2**20 * 8 / 2**14))


def test_the_plan_follows_the_step():
    config = CapacityConfig(factor=1.0, final_factor=3.0, factor_steps=2, drop_policy="token")
    for step, stay in ((0, 2), (1, 4), (2, 6)):
        ctx = TokenContext.of_rows(1, 6, step=step)
        plan = plan_capacity(routing_of([[0]] * 6, 3), ctx, config)
        assert plan.kept_E.tolist() == [stay, 0, 0] and plan.capacity == 6


@pytest.mark.requirement("R0-29")
def test_next_best_by_hand():
    """Expert 0 has room for 2 of 4; the others go where they would go next, and from a full one on to the last."""
    scores = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.55, 0.05, 0.4], [0.8, 0.15, 0.05]]
    routing = route_logits(torch.tensor(scores, dtype=torch.float64).log(), TokenContext.of_rows(1, 4), top_k=1)
    config = CapacityConfig(expert_capacity=2, overflow="next_best", drop_policy="probability")
    plan = plan_capacity(routing, TokenContext.of_rows(1, 4), config)
    assert kept(plan) == [(0, 1, 0), (1, 0, 1), (2, 2, 0), (3, 0, 0)]
    assert plan.asked_E.tolist() == [4, 0, 0] and plan.kept_E.tolist() == [2, 1, 1]
    assert plan.dropped_ME.tolist() == [[0, 0, 0]] * 3
    # The sum that the gates had before is kept.
    assert plan.gate_N.tolist() == pytest.approx([0.5, 0.6, 0.55, 0.8])
    raw = plan_capacity(
        routing,
        TokenContext.of_rows(1, 4),
        CapacityConfig(expert_capacity=2, overflow="next_best", renormalize_after_drop=False),
    )
    assert raw.gate_N.tolist() == pytest.approx([0.3, 0.6, 0.4, 0.8])


@pytest.mark.requirement("R0-29", "R0-30", "R0-31", "D3")
@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 3),
    num_experts=st.integers(1, 9),
    factor=st.floats(0.1, 1.6),
    policy=st.sampled_from(["probability", "gate", "choice", "token", "random"]),
    group=st.sampled_from(["rank", "sequence"]),
    ties=st.booleans(),
    data=st.data(),
)
def test_next_best(seed, rows, num_experts, factor, policy, group, ties, data):
    """Never over capacity, no expert twice in a token, and a pair is dropped only where no untried expert has room."""
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(rows * 8, num_experts, dtype=torch.float64, generator=generator)
    valid_T = torch.rand(rows * 8, generator=generator) < 0.8
    ctx = TokenContext.of_rows(rows, 8, valid_T=valid_T, seed=seed)
    routing = route_logits(logits_TE.round() if ties else logits_TE, ctx, top_k=top_k)
    config = CapacityConfig(factor=factor, overflow="next_best", drop_policy=policy, group=group)
    plan = plan_capacity(routing, ctx, config)
    rows_kept = kept(plan)
    assert len({(token, expert) for token, expert, _ in rows_kept}) == len(rows_kept), "an expert twice in a token"
    slots = [sorted(slot for _, e, slot in rows_kept if e == expert) for expert in range(num_experts)]
    assert slots == [list(range(count)) for count in plan.kept_E.tolist()]
    assert int(plan.asked_E.sum()) == int(plan.kept_E.sum() + plan.dropped_ME.sum()) == int(valid_T.sum()) * top_k
    assert (plan.gate_N[plan.slot_N < 0] == 0).all()
    group_of = [0] * (rows * 8) if group == "rank" else ctx.sequence_T.tolist()
    limit = config.limit(training=True)
    for member in set(group_of):
        tokens = [t for t in range(rows * 8) if group_of[t] == member and valid_T[t]]
        (most,) = limit.of_counts(torch.tensor([len(tokens)]), top_k, num_experts).tolist()
        held = [sum(1 for t, e, _ in rows_kept if e == expert and t in tokens) for expert in range(num_experts)]
        assert all(count <= most for count in held), "over capacity"
        open_experts = {expert for expert, count in enumerate(held) if count < most}
        for token in tokens:
            mine = {e for t, e, _ in rows_kept if t == token}
            asked = set(routing.expert_N.view(-1, top_k)[token].tolist())
            # Its own first choices it has tried; every other expert with room would have taken it.
            assert len(mine) == top_k or not open_experts - mine - asked


@pytest.mark.requirement("C20")
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_survivors_sum_to_one(overflow):
    """``renormalize_after_drop: one`` makes gates of a token sum to 1 whatever they summed to before."""
    gates = torch.tensor([[0.5, 0.3], [0.4, 0.2], [0.3, 0.1]], dtype=torch.float64)
    routing = routing_of([[0, 1], [0, 1], [0, 2]], 3, gates)
    config = CapacityConfig(
        expert_capacity=1, drop_policy="token", renormalize_after_drop="one", overflow=overflow, min_capacity=0
    )
    plan = plan_capacity(routing, TokenContext.of_rows(1, 3), config)
    lives_T = (plan.slot_N >= 0).view(3, 2).any(1)
    torch.testing.assert_close(plan.gate_N.view(3, 2).sum(1)[lives_T], torch.ones(int(lives_T.sum())).double())
    assert plan.gate_N[:2].tolist() == pytest.approx([0.625, 0.375])


def test_survivors_sum_to_one_where_all_survive():
    """What is trained so is measured so: dropless, and under a limit that nothing meets, are the same function."""
    gates = torch.tensor([[0.5, 0.3], [0.4, 0.2], [0.3, 0.1]], dtype=torch.float64)
    routing = routing_of([[0, 1], [0, 1], [0, 2]], 3, gates)
    ctx = TokenContext.of_rows(1, 3, valid_T=torch.tensor([True, True, False]))
    roomy = CapacityConfig(factor=10.0, renormalize_after_drop="one")
    limited, free = (plan_capacity(routing, ctx, config) for config in (roomy, roomy.without_limit()))
    assert torch.equal(free.gate_N, limited.gate_N)
    assert free.gate_N.view(3, 2).sum(1).tolist() == pytest.approx([1, 1, 0])


def test_policy_gate_follows_the_gates_and_not_the_scores():
    """Megatron: renormalised gates 0.9 of 0.45 beat 0.6 of 0.6."""
    probs = torch.tensor([[0.45, 0.05, 0.25, 0.25], [0.6, 0.3, 0.05, 0.05]], dtype=torch.float64)
    routing = routing_of([[0, 1], [0, 1]], 4, [[0.9, 0.1], [2 / 3, 1 / 3]])
    routing.score_TE[:] = probs
    for policy, first in (("gate", 0), ("probability", 1)):
        plan = plan_capacity(routing, TokenContext.of_rows(1, 2), CapacityConfig(expert_capacity=1, drop_policy=policy))
        assert [token for token, expert, _ in kept(plan) if expert == 0] == [first]


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"final_factor": 0.0}, "final_factor", "Set it above 0"),
        ({"factor": None, "final_factor": 2.0}, "final_factor", "Set moe.capacity.factor"),
        ({"rounding": "ceil_float32", "final_factor": 2.0}, "final_factor", "rounding to ceil or floor"),
        ({"final_factor": 2000.0}, "final_factor", "Set both ends to 1000 or less"),
        ({"final_factor": 2.0, "factor_steps": 10**7}, "factor_steps", "Set it to 1000000 or less"),
        ({"factor_steps": 0}, "factor_steps", "Set it to 1 or more"),
    ],
)
def test_errors(config, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        CapacityConfig(**config)
    assert caught.value.key == key and repr(config[key]) in str(caught.value)
