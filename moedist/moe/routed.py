"""What all layers of routed experts share, whatever their experts do: routing, its balance, and the account of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from moedist.config import ConfigError, require
from moedist.mesh import Axis
from moedist.mesh.collectives import all_sum
from moedist.moe.balance.contract import BalanceBias, BalanceConfig, BalanceLoss, SelectionBiasConfig, per_token
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan
from moedist.moe.report import CountedMass, MoEReport
from moedist.moe.router.contract import Router, RouterConfig, Routing


class RoutingRules(Protocol):
    """How a layer routes: what its config says of it."""

    @property
    def num_experts(self) -> int:
        """Experts of the layer over all ranks (E)."""
        ...

    @property
    def router(self) -> RouterConfig:
        """Who proposes."""
        ...

    @property
    def capacity(self) -> CapacityConfig:
        """How many pairs an expert takes."""
        ...

    @property
    def balance(self) -> Mapping[str, BalanceConfig]:
        """What keeps experts evenly used, by name."""
        ...


def check_routing(rules: RoutingRules) -> None:
    """Raises `ConfigError`, with keys below the layer's own, where the rules do not go together."""
    try:
        router = rules.router.build(1, rules.num_experts, device="meta")
    except ConfigError as error:
        raise error.under("router") from None
    require(
        not rules.router.has_own_capacity or rules.capacity.dropless,
        "capacity.factor",
        rules.capacity.factor,
        f"comes on top of the capacity that the router {rules.router.kind} has itself",
        f"Set moe.capacity.factor to null; moe.router.factor of {rules.router.kind} bounds the load.",
    )
    for name, balance in rules.balance.items():
        try:
            balance.check(router)
        except ConfigError as error:
            raise error.under(f"balance.{name}") from None
    check_bias_rules(rules.balance)


def check_bias_rules(balance: Mapping[str, BalanceConfig]) -> None:
    """A rule that finds the whole selection bias leaves nothing to others."""
    rules = {name: rule for name, rule in balance.items() if isinstance(rule, SelectionBiasConfig)}
    for name, rule in rules.items():
        others = [other for other in rules if other != name]
        require(
            not (rule.finds_whole_bias and others),
            f"balance.{name}",
            rule.kind,
            f"finds the whole selection bias in each step, and {', '.join(others)} would move it again",
            f"Leave one out: {' or '.join(f'~moe.balance.{each}' for each in (name, *others))}.",
        )


class RoutedLayer(nn.Module):
    """A router, what balances it and what it tells; a subclass has the experts.

    Attributes:
        config: with the `RoutingRules`.
        layer: its place among the routed layers of a model, which names its noise and its counts.
        dp: over which global counts run.
    """

    config: RoutingRules

    def __init__(self, config: RoutingRules, router: Router, layer: int):
        super().__init__()
        self.config, self.layer, self.dp = config, layer, Axis("dp")
        self.router = router
        methods = {name: method.build(config.num_experts) for name, method in config.balance.items()}
        self.losses = nn.ModuleDict({name: part for name, part in methods.items() if isinstance(part, BalanceLoss)})
        self.bias_rules = nn.ModuleDict({n: part for n, part in methods.items() if isinstance(part, BalanceBias)})
        if self.bias_rules:
            self.router.add_selection_bias()

    def report(self, routing: Routing, plan: CapacityPlan, ctx: TokenContext) -> MoEReport:
        """Balance losses in training only; counts and entropy always."""
        losses, pooled, coefficients, counts = {}, {}, {}, {}
        for name, loss in self.losses.items() if ctx.training else ():
            assert isinstance(loss, BalanceLoss)
            scope_counts, part = None, loss.count(routing, ctx)
            if part is not None:
                counts[name] = all_sum(part, self.dp)
                scope_counts = ctx.counts.over_scope((self.layer, name), counts[name], loss.config.needs_whole_step)
            share = loss(routing, plan, ctx, scope_counts)
            coefficients[name] = loss.coefficient(ctx)
            if isinstance(share, CountedMass):
                pooled[name] = share
            else:
                losses[name] = share
        with torch.no_grad():
            observed = self.observe(routing, ctx) if ctx.training else {}
            entropy_T = torch.special.entr(routing.probs_TE).sum(1).masked_fill(~ctx.valid_T, 0)
            top_T = routing.probs_TE.amax(1).masked_fill(~ctx.valid_T, 0)
            largest = max(math.log(self.config.num_experts), 1e-30)
            return MoEReport(
                layer=self.layer,
                losses=losses,
                coefficients=coefficients,
                pooled=pooled,
                counts=counts,
                observed=observed,
                router_entropy=per_token(entropy_T.sum(), ctx) / largest,
                top_probability=per_token(top_T.sum(), ctx),
                room=plan.room,
                asked_E=plan.asked_E,
                kept_E=plan.kept_E,
                dropped_ME=plan.dropped_ME,
            )

    @property
    def needs_whole_step(self) -> bool:
        """Whether a balance loss asks for the counts of the whole step (`StepCounts.whole`)."""
        return any(loss.config.needs_whole_step for loss in self.losses.children() if isinstance(loss, BalanceLoss))

    def observe(self, routing: Routing, ctx: TokenContext) -> dict[str, Tensor]:
        """What the rules for the selection bias must know of this micro-batch, by name."""
        seen = {name: rule.observe(self.router, routing, ctx) for name, rule in self._rules()}
        return {name: part for name, part in seen.items() if part is not None}

    @torch.no_grad()
    def move_bias(self, load_E: Tensor, observed: Mapping[str, Tensor] | None = None) -> None:
        """Moves the selection bias by every rule; called once per optimizer step, with the sums of the whole global
        batch.

        Args:
            load_E: int64 pairs asked of each expert, before any limit.
            observed: `MoEReport.observed`; None where no rule observes anything.
        """
        for name, rule in self._rules():
            assert self.router.selection_bias is not None
            self.router.selection_bias.copy_(rule(self.router.selection_bias, load_E, (observed or {}).get(name)))

    def _rules(self) -> Iterator[tuple[str, BalanceBias]]:
        for name, rule in self.bias_rules.items():
            assert isinstance(rule, BalanceBias)
            yield name, rule
