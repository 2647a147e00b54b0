"""A mixture of attention experts: every query is routed to a few of them, and each of those takes from all keys."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moedist.config import Config, ConfigError, require
from moedist.mesh import Axis
from moedist.model.attention.bank import (
    ONE_PASS,
    AttentionBank,
    BankCost,
    BankKind,
    GatheredBank,
    Passes,
    ReplicatedBank,
)
from moedist.model.attention.experts.contract import AttentionExpertConfig, ExpertSite, RowNames, Sight
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.norm.contract import NormConfig
from moedist.moe.balance.contract import BalanceConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw, below, fill_normal, fill_xavier_uniform
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan, plan_capacity
from moedist.moe.report import MoEReport
from moedist.moe.routed import RoutedLayer, check_routing
from moedist.moe.router.contract import RouterConfig, Routing
from moedist.moe.router.mlp import MLPConfig


def _default_balance() -> dict[str, BalanceConfig]:
    return {"switch": SwitchConfig(), "z_loss": ZLossConfig()}


@dataclasses.dataclass(frozen=True)
class MixtureConfig(Config):
    """A mixture of attention experts.

    Attributes:
        num_heads: heads of every expert.
        experts: one after the other; an expert's place is its global id. Kinds may differ, and repeat.
        router: who sends which query where.
        capacity: how many queries an expert takes. What it drops is a query's row; keys and values are never dropped.
        balance: losses by name.
        dropout: share of the attention weights that is dropped in training, drawn by name.
        bank: ``replicated`` (every rank holds all experts), ``gathered`` (a rank holds its share of them and is sent
            the others' weights in every pass), or ``auto``: gathered where it sends no more than replicated does.
    """

    num_heads: int = 4
    experts: tuple[AttentionExpertConfig, ...] = (
        StandardConfig(rope_theta=10_000.0),
        StandardConfig(rope_theta=10_000.0),
        HyperbolicConfig(),
        LinearConfig(),
    )
    router: RouterConfig = dataclasses.field(default_factory=MLPConfig)
    capacity: CapacityConfig = dataclasses.field(default_factory=lambda: CapacityConfig(factor=None))
    balance: dict[str, BalanceConfig] = dataclasses.field(default_factory=_default_balance)
    dropout: float = 0.0
    bank: BankKind = "auto"

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "is no head", "Set it to 1 or more.")
        require(
            len(self.experts) >= 1, "experts", [], "lists no expert", "List at least one, such as {kind: standard}."
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "is no share", "Set it in [0, 1).")
        check_routing(self)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def check_width(self, dim: int) -> None:
        """Raises `ConfigError` where an expert does not fit width ``dim``."""
        site = ExpertSite(dim, self.num_heads, device="meta")
        for place, expert in enumerate(self.experts):
            try:
                expert.check(site)
            except ConfigError as error:
                raise error.under(f"experts.{place}") from None

    def check_ep(self, ep: int, alike: str | None = None) -> None:
        """Raises `ConfigError` where the bank cannot be spread over ``ep`` ranks; ``alike`` as in
        `AttentionMixture.spread`."""
        if self.bank != "gathered" or ep == 1:
            return
        require(
            self.num_experts % ep == 0,
            "bank",
            self.bank,
            f"cannot cut {self.num_experts} attention experts into {ep} equal parts (mesh.ep = {ep})",
            "List a multiple of mesh.ep of them, or set bank to replicated or auto.",
        )
        require(
            alike is None,
            "bank",
            self.bank,
            f"gives each rank other parameters, and {alike}",
            "Set bank to replicated or auto.",
        )

    def build_mixture(
        self,
        dim: int,
        *,
        layer: int = 0,
        norm: NormConfig | None = None,
        output_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionMixture:
        """A mixture without first values (`AttentionMixture.init_weights`).

        Args:
            dim: width of queries, keys, values and output (D).
            layer: its place among the routed layers of a model, which names its noise and its counts.
            norm: for norms inside experts.
            output_std: standard deviation of the output projection at the start; None for Xavier uniform.
            device, dtype: of its parameters.

        Raises:
            ConfigError: an expert does not fit the width.
        """
        self.check_width(dim)
        site = ExpertSite(dim, self.num_heads, self.dropout, norm, device, dtype)
        return AttentionMixture(self, site, layer, output_std)


@dataclasses.dataclass(frozen=True)
class MixtureOutput:
    """What a mixture returns.

    Attributes:
        out_BQD: zero, but for the output projection's bias, where a query was dropped.
        report: the account.
        routing, plan: what was proposed, and what became of it.
        weights: see `moedist.model.attention.bank.Mixed`.
    """

    out_BQD: Tensor
    report: MoEReport
    routing: Routing
    plan: CapacityPlan
    weights: dict[int, Tensor] | None


class AttentionMixture(RoutedLayer):
    """Router of queries, plan, bank of attention experts, one output projection; written for one device.

    Attributes:
        output_weight, output_bias: [D, D] and [D], the projection behind the sum; its bias starts at zero.
        note: which bank computes and why, a line for people; None before `spread`.
    """

    config: MixtureConfig

    def __init__(self, config: MixtureConfig, site: ExpertSite, layer: int, output_std: float | None):
        router = config.router.build(site.dim, config.num_experts, layer=layer, device=site.device, dtype=site.dtype)
        super().__init__(config, router, layer)
        self.site, self.output_std = site, output_std
        self.note: str | None = None
        self.bank: AttentionBank = ReplicatedBank(config.experts, site)
        self.output_weight = site.parameter(site.dim, site.dim)
        self.output_bias = site.parameter(site.dim)

    def forward(
        self,
        query_BQD: Tensor,
        key_BSD: Tensor,
        value_BSD: Tensor,
        sight: Sight,
        ctx: TokenContext,
        need_weights: bool = False,
        named: bool = True,
    ) -> MixtureOutput:
        """[B, Q, D] queries, [B, S, D] keys and values -> [B, Q, D].

        Args:
            ctx: of the queries, T = B * Q.
            need_weights: whether to return attention weights, which takes B H Q S numbers per expert.
            named: whether ``ctx`` names the rows in a run, so that what is random is drawn by name; else by torch's
                generator.

        Raises:
            ValueError: an input has another width than the mixture, or keys and values have unlike shapes.
        """
        self._check_inputs(query_BQD, key_BSD, value_BSD)
        routing = self.router(query_BQD.flatten(0, 1), ctx)
        plan = plan_capacity(routing, ctx, self.config.capacity, layer=self.layer)
        if named:  # each expert puts its own id in
            sample_B = ctx.sample_T.view(query_BQD.shape[:2])[:, 0]
            sight = dataclasses.replace(sight, names=RowNames(ctx.seed, ctx.step, self.layer, 0, sample_B))
        mixed = self.bank(query_BQD, key_BSD, value_BSD, sight, plan, need_weights)
        out_BQD = nn.functional.linear(mixed.out_BQD, self.output_weight, self.output_bias)
        return MixtureOutput(out_BQD, self.report(routing, plan, ctx), routing, plan, mixed.weights)

    def _check_inputs(self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor) -> None:
        for name, rows in (("query", query_BQD), ("key", key_BSD), ("value", value_BSD)):
            if rows.shape[-1] != self.site.dim:
                raise ValueError(f"the {name} is {rows.shape[-1]} wide, and the mixture was built for {self.site.dim}")
        if key_BSD.shape != value_BSD.shape:
            raise ValueError(f"keys {tuple(key_BSD.shape)} and values {tuple(value_BSD.shape)} do not go together")

    def cost(self, ep: int, passes: Passes = ONE_PASS, alike: str | None = None) -> BankCost:
        """What `spread` chooses the bank by; arguments as there. Of a mixture that is not spread yet."""
        parameters = sum(parameter.numel() for parameter in self.bank.experts.parameters())
        if alike is None and self.config.num_experts % ep != 0:
            alike = f"{self.config.num_experts} experts are no multiple of the {ep} expert-parallel ranks"
        return BankCost(parameters, ep, passes, alike)

    def spread(self, ep: Axis, dp: Axis, passes: Passes = ONE_PASS, alike: str | None = None) -> None:
        """Chooses the bank, keeps this rank's experts and computes over ``ep`` from now on; global counts run over
        ``dp``. Before first values are given.

        Args:
            passes: of an optimizer step.
            alike: why all ranks must have the same parameters; None where nothing asks for it.

        Raises:
            ConfigError: the config asks for what cannot be.
        """
        self.config.check_ep(ep.size, alike)
        kind, why = self.cost(ep.size, passes, alike).choose(self.config.bank)
        self.dp = dp
        if kind == "gathered" and ep.size > 1:
            placement = Placement.in_order(self.config.num_experts, ep.size)
            self.bank = GatheredBank(self.bank, placement, ep)
        self.note = f"{self.config.num_experts} attention experts are {kind}: {why}"

    def init_weights(self, draw: Draw) -> None:
        """Fills router, experts by global id, and output projection."""
        self.router.init_weights(below(draw, "router"))
        self.bank.init_weights(below(draw, "bank"))
        if self.output_std is None:
            fill_xavier_uniform(self.output_weight, draw("output_weight"))
        else:
            fill_normal(self.output_weight, draw("output_weight"), self.output_std)
        nn.init.zeros_(self.output_bias)
