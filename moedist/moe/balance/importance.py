"""The importance loss: squared coefficient of variation of the experts' mass (Shazeer et al. 2017, equation 6)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.moe.balance.contract import BalanceLoss, ScopedLossConfig
from moedist.moe.context import TokenContext
from moedist.moe.plan import CapacityPlan
from moedist.moe.router.contract import Routing


@dataclasses.dataclass(frozen=True)
class ImportanceConfig(ScopedLossConfig):
    """``CV(importance)^2``, importance being each expert's sum of the full distribution; 0 when even."""

    coefficient: float = 0.01

    def build(self, num_experts: int) -> ImportanceLoss:  # noqa: D102
        return ImportanceLoss(self)


class SquaredVariation(BalanceLoss):
    """``CV^2`` of a sum over tokens, in the scope of the config; a subclass says of what."""

    config: ScopedLossConfig

    def terms(self, routing: Routing) -> Tensor:
        """[T, E], with gradient: what is summed."""
        raise NotImplementedError

    def valid_terms(self, routing: Routing, ctx: TokenContext) -> Tensor:
        """The same without padding."""
        return self.terms(routing).masked_fill(~ctx.valid_T[:, None], 0)

    def count(self, routing: Routing, ctx: TokenContext) -> Tensor | None:
        """fp64 [E + 1]: the sums, and behind them the number of tokens."""
        if self.config.scope != "global":
            return None
        sum_E = self.valid_terms(routing, ctx).detach().sum(0)
        return torch.cat([sum_E.double(), ctx.valid_T.sum()[None].double()])

    def forward(self, routing: Routing, plan: CapacityPlan, ctx: TokenContext, counts: Tensor | None = None) -> Tensor:
        """The mean over groups, weighted by valid tokens; this rank's share of it."""
        term_TE = self.valid_terms(routing, ctx)
        valid_T = ctx.valid_T.to(term_TE.dtype)
        if self.config.scope == "sequence":
            length = term_TE.shape[0] // max(ctx.num_sequences, 1)
            own_GE = term_TE.view(ctx.num_sequences, length, term_TE.shape[1]).sum(1)
            own_G = valid_T.view(ctx.num_sequences, length).sum(1)
        else:
            own_GE, own_G = term_TE.sum(0)[None], valid_T.sum()[None]
        sum_GE, tokens_G = own_GE, own_G
        if counts is not None:
            # The whole scope's sum, in which this micro-batch's part alone carries gradient.
            sum_GE = own_GE + (counts[:-1] - own_GE.detach()).to(own_GE.dtype)
            tokens_G = counts[-1:].to(own_G.dtype)
        value_G = squared_cv(sum_GE)
        # Gradients count with the group's whole weight in every part; the value is cut into shares by tokens.
        share_G = (value_G - value_G.detach()) * tokens_G + value_G.detach() * own_G
        return share_G.sum() / ctx.num_tokens.clamp_min(1)


def squared_cv(value_GE: Tensor) -> Tensor:
    """[G]: variance / mean squared over experts; 0 where the mean is 0."""
    mean_G = value_GE.mean(1)
    variance_G = (value_GE - mean_G[:, None]).square().mean(1)
    return variance_G / torch.where(mean_G > 0, mean_G, 1).square()


class ImportanceLoss(SquaredVariation):
    """Of the full distribution."""

    def terms(self, routing: Routing) -> Tensor:
        """The probabilities."""
        return routing.probs_TE
