"""What must hold of a layer for any batch, router, policy and overflow: the account, padding, order, ties."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoE, MoEConfig
from moedist.moe.plan import CapacityPlan, plan_capacity
from moedist.moe.router.contract import RouterConfig
from moedist.moe.router.cosine import CosineConfig
from moedist.moe.router.expert_choice import ExpertChoiceConfig
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.hash import HashConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.sinkhorn import SinkhornConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit
from tests.moe.by_hand import kept, route_logits

BOUNDED = settings(max_examples=25, derandomize=True, deadline=None, database=None)
E, DIM = 8, 4
ROUTERS: dict[str, RouterConfig] = {
    "switch": TopKConfig(top_k=1, input_jitter=0.1),
    "noise": TopKConfig(top_k=3, noise_std=0.5, renormalize=False),
    "deepseek": TopKConfig(top_k=2, score="sigmoid", groups=GroupLimit(4, 2), scale=2.5),
    "dense": TopKConfig(mode="dense"),
    "noisy": NoisyConfig(top_k=2),
    "mlp": MLPConfig(top_k=2, score="sqrt_softplus", hidden_dim=6),
    "cosine": CosineConfig(top_k=2),
    "hash": HashConfig(top_k=2),
    "sinkhorn": SinkhornConfig(top_k=2),
    "expert choice": ExpertChoiceConfig(),
    "balanced": ForcedConfig(top_k=2),
    "zipf": ForcedConfig(top_k=2, pattern="zipf"),
}
POLICIES = ("probability", "gate", "choice", "token", "random")
each_router = pytest.mark.parametrize("name", ROUTERS)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch and a capacity rule."""

    seed: int
    rows: int
    length: int
    factor: float
    policy: str
    overflow: str
    group: str
    padding: float

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length

    def layer(self, name: str, **capacity: object) -> MoE:
        """A layer with this rule, which a router with a capacity of its own does without."""
        keys = {"factor": self.factor, "drop_policy": self.policy, "overflow": self.overflow, "group": self.group}
        if ROUTERS[name].has_own_capacity:
            keys = {"factor": None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # factors below 1 are the point here
            rule = CapacityConfig(**{**keys, **capacity})
        config = MoEConfig(E, ROUTERS[name], rule, experts=LoopConfig(hidden_dim=4, bias=True), balance={})
        return config.build(DIM, layer=1, dtype=torch.float64)

    def generator(self, more: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + more)

    def vectors(self) -> torch.Tensor:
        return torch.randn(self.num_tokens, DIM, dtype=torch.float64, generator=self.generator())

    def ctx(self) -> TokenContext:
        return TokenContext.of_rows(
            self.rows,
            self.length,
            id_T=torch.randint(50, (self.num_tokens,), generator=self.generator(1)),
            valid_T=torch.rand(self.num_tokens, generator=self.generator(2)) >= self.padding,
            seed=self.seed,
        )


drawn_batches = st.builds(
    Drawn,
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 3),
    length=st.integers(1, 10),
    factor=st.floats(0.2, 2.0),
    policy=st.sampled_from(POLICIES),
    overflow=st.sampled_from(["drop", "next_best"]),
    group=st.sampled_from(["rank", "sequence"]),
    padding=st.sampled_from([0.0, 0.3, 1.0]),
)


def plan_of(layer: MoE, x_TD: torch.Tensor, ctx: TokenContext) -> CapacityPlan:
    return plan_capacity(layer.router(x_TD, ctx), ctx, layer.config.capacity, layer=layer.layer)


@pytest.mark.requirement("R0-21", "R0-31", "D3")
@pytest.mark.pitfall("16", "19")
@each_router
@BOUNDED
@given(drawn=drawn_batches)
def test_the_account_is_exact(name: str, drawn: Drawn):
    """Never over capacity, kept + dropped = asked, slots dense, and no pair of a padding token."""
    layer, x_TD, ctx = drawn.layer(name), drawn.vectors(), drawn.ctx()
    plan = plan_of(layer, x_TD, ctx)
    rows = kept(plan)
    num_valid = int(ctx.valid_T.sum())
    assert all(ctx.valid_T[token] for token, _, _ in rows), "padding was given a slot"
    assert len({(token, expert) for token, expert, _ in rows}) == len(rows), "an expert twice in a token"
    slots = [sorted(slot for _, e, slot in rows if e == expert) for expert in range(E)]
    assert slots == [list(range(number)) for number in plan.kept_E.tolist()]
    assert int(plan.asked_E.sum()) == int(plan.kept_E.sum()) + int(plan.dropped_ME.sum())
    router, top_k = layer.config.router, layer.config.router.experts_per_token(E)
    if router.has_own_capacity:
        assert plan.kept_E.tolist() == [min(num_valid, -(-2 * num_valid // E))] * E
    else:
        assert int(plan.asked_E.sum()) == num_valid * top_k
        limit = layer.config.capacity.limit(training=True)
        group_of = torch.zeros_like(ctx.sequence_T) if drawn.group == "rank" else ctx.sequence_T
        for group in group_of.unique().tolist():
            size_G = (ctx.valid_T & (group_of == group)).sum()[None]
            (most,) = limit.of_counts(size_G, top_k, E).tolist()
            for expert in range(E):
                assert sum(e == expert and group_of[t] == group for t, e, _ in rows) <= most, "over capacity"
    out_TD = layer(x_TD, ctx).out_TD
    assert out_TD.isfinite().all() and (out_TD[~ctx.valid_T] == 0).all()
    idle_T = torch.ones(drawn.num_tokens, dtype=torch.bool)
    idle_T[[token for token, _, _ in rows]] = False
    assert (out_TD[idle_T] == 0).all()


@pytest.mark.pitfall("16")
@each_router
@BOUNDED
@given(drawn=drawn_batches)
def test_what_stands_at_padding_is_not_seen(name: str, drawn: Drawn):
    layer, x_TD, ctx = drawn.layer(name), drawn.vectors(), drawn.ctx()
    other_TD = torch.where(ctx.valid_T[:, None], x_TD, 1e6 * torch.rand(x_TD.shape, generator=drawn.generator(3)))
    other = dataclasses.replace(ctx, id_T=torch.where(ctx.valid_T, ctx.id_T, 7))
    one, two = layer(x_TD, ctx), layer(other_TD, other)
    assert torch.equal(one.out_TD, two.out_TD)
    for field in ("asked_E", "kept_E", "dropped_ME", "router_entropy"):
        assert torch.equal(getattr(one.report, field), getattr(two.report, field)), field


# Those in whose choice the order of tokens counts: experts in turn.
UNORDERED = sorted(set(ROUTERS) - {"balanced"})


@pytest.mark.parametrize("name", UNORDERED)
@BOUNDED
@given(drawn=drawn_batches, policy=st.sampled_from(["probability", "gate", "random", "dropless"]))
def test_reordering_tokens_reorders_the_output(name: str, drawn: Drawn, policy: str):
    """With the names of the tokens, so noise and random drops go along; dropping on, by rules that do not look at
    places. (Equal scores are ordered by place: hash routing, whose scores are all equal, drops at random here.)"""
    if policy == "dropless":
        layer = drawn.layer(name, factor=None)
    elif ROUTERS[name].has_own_capacity:
        layer = drawn.layer(name)
    else:
        tied = name == "hash" or (ROUTERS[name].experts_per_token(E) == 1 and policy == "gate")
        layer = drawn.layer(name, group="rank", drop_policy="random" if tied else policy)
    x_TD, ctx = drawn.vectors(), drawn.ctx()
    order_T = torch.randperm(drawn.num_tokens, generator=drawn.generator(4))
    by_token = ("id_T", "valid_T", "sequence_T", "sample_T", "position_T")
    moved = dataclasses.replace(ctx, **{field: getattr(ctx, field)[order_T] for field in by_token})
    one, two = layer(x_TD, ctx), layer(x_TD[order_T], moved)
    torch.testing.assert_close(two.out_TD, one.out_TD[order_T], atol=1e-12, rtol=0)
    assert torch.equal(one.report.kept_E, two.report.kept_E)
    assert torch.equal(one.report.dropped_ME, two.report.dropped_ME)


@pytest.mark.pitfall("21", "24")
@BOUNDED
@given(drawn=drawn_batches, top_k=st.integers(1, E), levels=st.integers(1, 3))
def test_ties_go_to_the_lowest_expert_and_the_first_token(drawn: Drawn, top_k: int, levels: int):
    """Scores with few different values: choices and who stays are those of Python's sort, which is stable."""
    logits_TE = torch.randint(levels, (drawn.num_tokens, E), generator=drawn.generator()).double()
    ctx = drawn.ctx()
    routing = route_logits(logits_TE, ctx, top_k=top_k)
    wanted = [sorted(range(E), key=lambda e, row=row: -row[e])[:top_k] for row in logits_TE.tolist()]
    assert routing.expert_N.view(-1, top_k).tolist() == wanted
    rule = drawn.layer("noise", overflow="drop", drop_policy="probability").config.capacity
    plan = plan_capacity(routing, ctx, rule)
    limit, score = rule.limit(training=True), routing.score_TE
    group_of = torch.zeros_like(ctx.sequence_T) if drawn.group == "rank" else ctx.sequence_T
    for expert in range(E):
        for group in group_of.unique().tolist():
            (most,) = limit.of_counts((ctx.valid_T & (group_of == group)).sum()[None], top_k, E).tolist()
            askers = [t for t, row in enumerate(wanted) if expert in row and ctx.valid_T[t] and group_of[t] == group]
            first = sorted(askers, key=lambda t, expert=expert: -score[t, expert].item())[:most]
            assert sorted(t for t, e, _ in kept(plan) if e == expert and group_of[t] == group) == sorted(first)
