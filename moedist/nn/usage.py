"""What each expert was used for in a forward pass, and the report of it for people."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.mesh import Axis
from moedist.mesh.collectives import all_sum
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoE
from moedist.moe.plan import CapacityPlan, count
from moedist.moe.report import MoEReport
from moedist.moe.router.contract import Routing


@dataclasses.dataclass(frozen=True)
class Usage:
    """Sums over tokens, before any limit, without gradient.

    A pair is *used* where its token chose the expert; with dense routing, where its probability is above 1 / (2 E)
    (a fixed threshold would find no expert used once there are many of them).

    Attributes:
        tokens_E: used pairs of each expert.
        weight_E: routing weight (gates) of each expert, over all pairs.
        used_weight_E: the same over used pairs.
        mass_E: probability of each expert, of the full distribution.
        squared_weight: 0-dim, squared gates over all pairs: of one token 1 where one expert has all its weight, 1 / K
            where K experts share it evenly.
        num_tokens: 0-dim; all are fp64, so that one collective sums them and counts stay exact.
    """

    tokens_E: Tensor
    weight_E: Tensor
    used_weight_E: Tensor
    mass_E: Tensor
    squared_weight: Tensor
    num_tokens: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing, ctx: TokenContext) -> Usage:
        """Of this rank's micro-batch."""
        num_experts = routing.probs_TE.shape[1]
        live_N = ctx.valid_T[routing.token_N]
        if routing.live_N is not None:
            live_N = live_N & routing.live_N
        used_N = live_N
        if routing.pairs_per_token == num_experts:
            used_N = live_N & (routing.probs_TE[routing.token_N, routing.expert_N] > 0.5 / num_experts)
        gate_N = torch.where(live_N, routing.gate_N.double(), 0)

        def by_expert(value_N: Tensor) -> Tensor:
            return value_N.new_zeros(num_experts).scatter_add_(0, routing.expert_N, value_N)

        return cls(
            tokens_E=count(routing.expert_N, num_experts, used_N).double(),
            weight_E=by_expert(gate_N),
            used_weight_E=by_expert(torch.where(used_N, gate_N, 0)),
            mass_E=routing.probs_TE.double().masked_fill(~ctx.valid_T[:, None], 0).sum(0),
            squared_weight=gate_N.square().sum(),
            num_tokens=ctx.valid_T.sum().double(),
        )

    @classmethod
    @torch.no_grad()
    def of_gates(cls, gate_TE: Tensor) -> Usage:
        """Of a matrix of gates [..., E], 0 where a token does not use an expert."""
        gate_TE = gate_TE.reshape(-1, gate_TE.shape[-1]).double()
        weight_E = gate_TE.sum(0)
        return cls(
            tokens_E=(gate_TE > 0).sum(0).double(),
            weight_E=weight_E,
            used_weight_E=weight_E,
            mass_E=weight_E,
            squared_weight=gate_TE.square().sum(),
            num_tokens=torch.tensor(gate_TE.shape[0], dtype=torch.float64, device=gate_TE.device),
        )

    def over(self, dp: Axis) -> Usage:
        """Summed over the ranks; collective."""
        scalars = torch.stack([self.squared_weight, self.num_tokens])
        packed = torch.cat([self.tokens_E, self.weight_E, self.used_weight_E, self.mass_E, scalars])
        of_experts, scalars = all_sum(packed, dp).split([packed.numel() - 2, 2])
        tokens_E, weight_E, used_weight_E, mass_E = of_experts.view(4, -1)
        return Usage(tokens_E, weight_E, used_weight_E, mass_E, scalars[0], scalars[1])

    def balance_loss(self) -> Tensor:
        """0-dim: ``E sum_i f_i P_i`` of these tokens; 0 without any."""
        share_E = self.tokens_E / self.tokens_E.sum().clamp_min(1)
        return self.tokens_E.numel() * (share_E * self.mass_E).sum() / self.num_tokens.clamp_min(1)


@dataclasses.dataclass(frozen=True)
class UsageReport(MoEReport):
    """A report that knows the usage too."""

    usage: Usage


class WatchedMoE(MoE):
    """The core layer, whose reports are `UsageReport`."""

    def report(self, routing: Routing, plan: CapacityPlan, ctx: TokenContext) -> UsageReport:
        """As the core's, and the usage."""
        return UsageReport(**super().report(routing, plan, ctx).__dict__, usage=Usage.of(routing, ctx))


FORMATS = {
    "tokens": ".0f",
    "prob_mass": ".4f",
    "prob_fraction": ".4f",
    "avg_weight": ".4f",
    "load_balance_loss": ".6f",
    "usage_variance": ".6f",
    "usage_variance_fraction": ".6f",
    "max_min_ratio": ".4f",
}
"""How `Diagnostics.as_strings` writes a number, by its key without ``expert_i_``."""


class Diagnostics(dict[str, float | int | str]):
    """Numbers by name."""

    def as_strings(self) -> dict[str, str]:
        """The same for people: counts without decimals, weights with four, losses and variances with six."""
        return {key: _text(key, value) for key, value in self.items()}


def _text(key: str, value: float | int | str) -> str:
    kind = key.split("_", 2)[2] if key.startswith("expert_") else key
    return format(value, FORMATS[kind]) if kind in FORMATS else str(value)


def usage_diagnostics(usage: Usage, *, with_loss: bool) -> Diagnostics:
    """The numbers of summed usage.

    - ``expert_i_tokens``: used pairs. ``expert_i_prob_mass``: total routing weight; ``expert_i_prob_fraction``: its
      share of all experts'. ``expert_i_avg_weight``: mean weight where used.
    - ``load_balance_loss``: of the Switch form, 1 for uniform routing; with ``with_loss``.
    - ``usage_variance``: population variance of the counts; ``usage_variance_fraction``: of their shares.
    - ``max_min_ratio``: most over least used; 1 is even, inf where an expert was not used.
    """
    tokens_E, weight_E = usage.tokens_E.cpu(), usage.weight_E.cpu()
    average_E = usage.used_weight_E.cpu() / tokens_E.clamp_min(1)
    fraction_E = weight_E / weight_E.sum().clamp_min(torch.finfo(weight_E.dtype).tiny)
    found = Diagnostics()
    for expert, tokens in enumerate(tokens_E.tolist()):
        found[f"expert_{expert}_tokens"] = tokens
        found[f"expert_{expert}_prob_mass"] = weight_E[expert].item()
        found[f"expert_{expert}_prob_fraction"] = fraction_E[expert].item()
        found[f"expert_{expert}_avg_weight"] = average_E[expert].item()
    if with_loss:
        found["load_balance_loss"] = usage.balance_loss().item()
    share_E = tokens_E / tokens_E.sum().clamp_min(1)
    found["usage_variance"] = tokens_E.var(correction=0).item()
    found["usage_variance_fraction"] = share_E.var(correction=0).item()
    least = tokens_E.min().item()
    found["max_min_ratio"] = tokens_E.max().item() / least if least else float("inf")
    return found
