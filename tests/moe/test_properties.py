"""What must hold for any batch: random shapes, policies and scores, ties, infinities and NaN among them."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.mesh import Axis
from moedist.moe.bank.dispatched import DispatchedBank
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.init import named_draw
from moedist.moe.layer import MoEConfig
from moedist.moe.placement import Placement
from moedist.moe.plan import DROP_REASONS, plan_capacity
from moedist.moe.router.contract import Routing
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import kept

BOUNDED = settings(max_examples=80, derandomize=True, deadline=None, database=None)
POLICIES = ("probability", "gate", "choice", "token", "random")
KINDS = ("random", "ties", "equal", "infinite", "one-hot", "nan")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch and a capacity rule."""

    seed: int
    rows: int
    length: int
    num_experts: int
    top_k: int
    factor: float
    policy: str
    group: str
    kind: str
    padding: float

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length

    def ctx(self) -> TokenContext:
        generator = torch.Generator().manual_seed(self.seed)
        valid_T = torch.rand(self.num_tokens, generator=generator) >= self.padding
        return TokenContext.of_rows(self.rows, self.length, valid_T=valid_T, seed=self.seed)

    def logits_TE(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        logits_TE = torch.randn(self.num_tokens, self.num_experts, dtype=torch.float64, generator=generator)
        if self.kind == "ties":
            return logits_TE.round()
        if self.kind == "equal":
            return torch.zeros_like(logits_TE)
        if self.kind == "infinite":  # but one, so that a softmax exists
            return logits_TE.masked_fill(torch.arange(self.num_experts) > 0, -torch.inf)
        if self.kind == "one-hot":
            return 1e4 * torch.nn.functional.one_hot(logits_TE.argmax(1), self.num_experts).double()
        if self.kind == "nan" and self.num_tokens:
            logits_TE[self.seed % self.num_tokens] = torch.nan
        return logits_TE

    def config(self, factor: float | None = -1.0, overflow: str = "drop") -> CapacityConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CapacityConfig(
                factor=self.factor if factor == -1.0 else factor,
                drop_policy=self.policy,
                group=self.group,
                overflow=overflow,
            )


@st.composite
def batches(draw):
    num_experts = draw(st.integers(1, 16))
    return Drawn(
        seed=draw(st.integers(0, 10_000)),
        rows=draw(st.integers(0, 4)),
        length=draw(st.integers(0, 16)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        factor=draw(st.floats(0.1, 4.0)),
        policy=draw(st.sampled_from(POLICIES)),
        group=draw(st.sampled_from(["rank", "sequence"])),
        kind=draw(st.sampled_from(KINDS)),
        padding=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


def routed(drawn: Drawn) -> Routing:
    """The top-k router's pairs, its logits being the given ones (a product with infinities would make NaN of them)."""
    logits_TE = drawn.logits_TE()
    probs_TE = logits_TE.softmax(1)
    expert_TK = logits_TE.sort(dim=1, descending=True, stable=True).indices[:, : drawn.top_k]
    gate_N = probs_TE.gather(1, expert_TK).reshape(-1)
    return Routing(
        token_N=torch.arange(drawn.num_tokens).repeat_interleave(drawn.top_k),
        expert_N=expert_TK.reshape(-1),
        gate_N=gate_N,
        score_TE=probs_TE,
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        pairs_per_token=drawn.top_k,
    )


@pytest.mark.requirement("R0-31", "D3")
@BOUNDED
@given(batches())
def test_slots_are_dense_and_within_the_limit(drawn):
    """Properties (a) and (b)."""
    ctx, config = drawn.ctx(), drawn.config()
    plan = plan_capacity(routed(drawn), ctx, config)
    limit = config.limit(training=True)
    rows = kept(plan)
    slots = {expert: sorted(slot for _, e, slot in rows if e == expert) for expert in range(drawn.num_experts)}
    assert all(slots[expert] == list(range(len(slots[expert]))) for expert in slots)
    assert plan.kept_E.tolist() == [len(slots[expert]) for expert in range(drawn.num_experts)]
    assert plan.kept_E.max() <= plan.capacity
    dropped = int(plan.asked_E.sum() - plan.kept_E.sum())
    assert len(rows) + dropped == int(ctx.valid_T.sum()) * drawn.top_k
    groups = [ctx.valid_T] if drawn.group == "rank" else list(ctx.valid_T.view(drawn.rows, drawn.length))
    sizes = torch.tensor([int(group.sum()) for group in groups], dtype=torch.int64)
    group_of = [0] * drawn.num_tokens if drawn.group == "rank" else ctx.sequence_T.tolist()
    for group, most in enumerate(limit.of_counts(sizes, drawn.top_k, drawn.num_experts).tolist()):
        for expert in range(drawn.num_experts):
            stay = sum(1 for token, e, _ in rows if e == expert and group_of[token] == group)
            asked = sum(
                1
                for token, e in zip(plan.token_N.tolist(), plan.expert_N.tolist(), strict=True)
                if e == expert and group_of[token] == group and ctx.valid_T[token]
            )
            assert stay == min(asked, most), "a pair is dropped only where its expert is full"
    assert (plan.gate_N[plan.slot_N < 0] == 0).all()


@BOUNDED
@given(batches(), st.sampled_from(["drop", "next_best"]), st.booleans())
def test_every_drop_has_one_reason_and_it_is_the_true_one(drawn, overflow, limited):
    """Kept and dropped are what was asked, pair by pair; a reason is checked against what has room in the end."""
    ctx, routing = drawn.ctx(), routed(drawn)
    if limited:  # any experts that the token did choose, and some more
        generator = torch.Generator().manual_seed(drawn.seed)
        allowed_TE = torch.rand(routing.probs_TE.shape, generator=generator) < 0.5
        allowed_TE[routing.token_N, routing.expert_N] = True
        routing = dataclasses.replace(routing, allowed_TE=allowed_TE)
    config = drawn.config(overflow=overflow)
    plan = plan_capacity(routing, ctx, config)
    assert int(plan.asked_E.sum()) == int(plan.kept_E.sum()) + int(plan.dropped_ME.sum())
    rows = kept(plan)
    group_of = [0] * drawn.num_tokens if drawn.group == "rank" else ctx.sequence_T.tolist()
    sizes = {g: sum(group == g and bool(ok) for group, ok in zip(group_of, ctx.valid_T, strict=True)) for g in group_of}
    limit = config.limit(training=True)
    room = {
        (g, e): limit.of_counts(torch.tensor([size]), drawn.top_k, drawn.num_experts).item()
        - sum(expert == e and group_of[token] == g for token, expert, _ in rows)
        for g, size in sizes.items()
        for e in range(drawn.num_experts)
    }
    assert min(room.values(), default=0) >= 0, "over capacity"
    expected = torch.zeros_like(plan.dropped_ME)
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), plan.slot_N.tolist(), strict=True)
    for token, asked, slot in pairs:
        if slot >= 0 or not ctx.valid_T[token]:
            continue
        free = {e for e in range(drawn.num_experts) if room[group_of[token], e] > 0}
        if overflow == "drop":
            assert asked not in free
            reason = "full"
        elif not free:
            reason = "exhausted"
        else:
            mine = {e for t, e, _ in rows if t == token}
            foreign = set() if not limited else set((~allowed_TE[token]).nonzero().flatten().tolist())
            assert free <= mine | foreign, "it could have gone there"
            reason = "barred"
        expected[DROP_REASONS.index(reason), asked] += 1
    assert torch.equal(plan.dropped_ME, expected)


@BOUNDED
@given(batches(), st.floats(0.1, 4.0))
def test_a_larger_factor_never_drops_more(drawn, other):
    """Property (f): pairs that stay at a factor stay at every larger one."""
    low, high = sorted((drawn.factor, other))
    ctx, routing = drawn.ctx(), routed(drawn)
    few = {row[:2] for row in kept(plan_capacity(routing, ctx, drawn.config(low)))}
    many = {row[:2] for row in kept(plan_capacity(routing, ctx, drawn.config(high)))}
    everything = {row[:2] for row in kept(plan_capacity(routing, ctx, drawn.config(None)))}
    assert few <= many <= everything


@BOUNDED
@given(batches())
def test_survivors_carry_the_sum_that_was_there(drawn):
    drawn = dataclasses.replace(drawn, kind="random")
    ctx, routing = drawn.ctx(), routed(drawn)
    plan = plan_capacity(routing, ctx, drawn.config())
    before_T = routing.gate_N.view(-1, drawn.top_k).sum(1)
    after_T = plan.gate_N.view(-1, drawn.top_k).sum(1)
    lives_T = (plan.slot_N >= 0).view(-1, drawn.top_k).any(1)
    torch.testing.assert_close(after_T, torch.where(lives_T, before_T, 0), atol=1e-12, rtol=0)


def layer_of(drawn: Drawn, dispatch=None) -> DispatchedBank:
    experts = LoopConfig(hidden_dim=4, bias=True).build(3, drawn.num_experts, dtype=torch.float64)
    experts.init_weights(named_draw(drawn.seed))
    return DispatchedBank(experts, dispatch or AllToAllConfig())


def vectors(drawn: Drawn, seed: int = 0) -> torch.Tensor:
    return torch.randn(drawn.num_tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@BOUNDED
@given(batches(), st.sampled_from([AllToAllConfig(), PaddedConfig()]))
def test_combine_of_dispatch_is_linear(drawn, dispatch):
    """Property (e)."""
    drawn = dataclasses.replace(drawn, kind="ties")
    plan = plan_capacity(routed(drawn), drawn.ctx(), drawn.config())
    dispatcher = dispatch.build(Placement.in_order(drawn.num_experts, 1), Axis("ep"))

    def through(x_TD):
        arrived = dispatcher.dispatch(x_TD, plan)
        return dispatcher.combine(arrived.rows.x_RD, arrived.ticket)

    a_TD, b_TD = vectors(drawn, 0), vectors(drawn, 1)
    torch.testing.assert_close(through(2 * a_TD - 3 * b_TD), 2 * through(a_TD) - 3 * through(b_TD), atol=1e-12, rtol=0)
    times_T = (plan.slot_N >= 0).view(-1, drawn.top_k).sum(1)
    torch.testing.assert_close(through(a_TD), a_TD * times_T[:, None], atol=1e-12, rtol=0)


@BOUNDED
@given(batches())
def test_renaming_experts_changes_nothing(drawn):
    """Property (g), first half: the same experts under other numbers."""
    drawn = dataclasses.replace(drawn, kind="random", policy="probability")
    routing, ctx, x_TD = routed(drawn), drawn.ctx(), vectors(drawn)
    order_E = torch.randperm(drawn.num_experts, generator=torch.Generator().manual_seed(drawn.seed))
    renamed = dataclasses.replace(
        routing,
        expert_N=order_E.argsort()[routing.expert_N],
        probs_TE=routing.probs_TE[:, order_E],
        score_TE=routing.score_TE[:, order_E],
    )
    bank, other = layer_of(drawn), layer_of(drawn)
    with torch.no_grad():
        for parameter in other.experts.parameters():
            parameter.copy_(parameter[order_E].clone())
    plan, renamed_plan = (plan_capacity(r, ctx, drawn.config()) for r in (routing, renamed))
    assert torch.equal(renamed_plan.kept_E, plan.kept_E[order_E])
    torch.testing.assert_close(bank(x_TD, plan), other(x_TD, renamed_plan), atol=1e-12, rtol=0)


@BOUNDED
@given(batches())
def test_reordering_tokens_reorders_the_dropless_output(drawn):
    """Property (g), second half."""
    drawn = dataclasses.replace(drawn, kind="random", group="rank", padding=0.0)
    routing, ctx, x_TD, bank = routed(drawn), drawn.ctx(), vectors(drawn), layer_of(drawn)
    order_T = torch.randperm(drawn.num_tokens, generator=torch.Generator().manual_seed(drawn.seed))

    def by_token(value_N):
        return value_N.view(-1, drawn.top_k)[order_T].reshape(-1)

    reordered = dataclasses.replace(
        routing,
        expert_N=by_token(routing.expert_N),
        gate_N=by_token(routing.gate_N),
        score_TE=routing.score_TE[order_T],
        probs_TE=routing.probs_TE[order_T],
        logits_TE=routing.logits_TE[order_T],
    )
    outputs = [
        bank(x, plan_capacity(r, ctx, drawn.config(None))) for x, r in ((x_TD, routing), (x_TD[order_T], reordered))
    ]
    torch.testing.assert_close(outputs[0][order_T], outputs[1], atol=1e-12, rtol=0)


@pytest.mark.pitfall("16")
@settings(BOUNDED, max_examples=40)
@given(batches(), st.integers(1, 5))
def test_padding_changes_nothing(drawn, extra):
    """Property (j), pitfall 16: what stands behind a row's end is not seen, whatever it is."""
    drawn = dataclasses.replace(drawn, padding=0.0)
    config = MoEConfig(
        num_experts=drawn.num_experts,
        router=TopKConfig(top_k=drawn.top_k),
        capacity=drawn.config(),
        experts=LoopConfig(hidden_dim=4),
    )
    layer = config.build(3, dtype=torch.float64)
    x_BSD = vectors(drawn).view(drawn.rows, drawn.length, 3)
    longer_BSD = torch.cat([x_BSD, 50 + torch.zeros(drawn.rows, extra, 3, dtype=torch.float64)], 1)
    valid_BS = torch.arange(drawn.length + extra).expand(drawn.rows, -1) < drawn.length
    plain = layer(x_BSD.flatten(0, 1), TokenContext.of_rows(drawn.rows, drawn.length))
    padded = layer(
        longer_BSD.flatten(0, 1),
        TokenContext.of_rows(drawn.rows, drawn.length + extra, valid_T=valid_BS.reshape(-1)),
    )
    out_TD = padded.out_TD.view(drawn.rows, drawn.length + extra, 3)
    torch.testing.assert_close(out_TD[:, : drawn.length].flatten(0, 1), plain.out_TD, atol=1e-12, rtol=0)
    assert (out_TD[:, drawn.length :] == 0).all()
    assert torch.equal(padded.report.asked_E, plain.report.asked_E)
    assert torch.equal(padded.report.kept_E, plain.report.kept_E)
    for name, value in plain.report.losses.items():
        assert padded.report.losses[name].item() == pytest.approx(value.item(), abs=1e-12)
    assert padded.report.router_entropy.item() == pytest.approx(plain.report.router_entropy.item(), abs=1e-12)
