"""Balanced assignment by Sinkhorn's algorithm (S-BASE, Clark et al. 2022, section 4.1.1)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.config import require
from moedist.moe.context import TokenContext
from moedist.moe.router.contract import Router, RouterSite
from moedist.moe.router.topk import TopKConfig, TopKRouter
from moedist.moe.token_choice import ScoreFunction


@dataclasses.dataclass(frozen=True)
class SinkhornConfig(TopKConfig):
    """The logits of all of a rank's tokens are scaled by rows and columns until every expert has an equal share, and
    each token picks its best experts in that; gates come from the unscaled logits.

    A token's experts depend on the whole batch, so a causal model refuses it.

    Attributes:
        iterations: rounds of scaling. A fixed number, so that the host never asks whether it has converged.
    """

    top_k: int = 1
    score: ScoreFunction = "sigmoid"
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.iterations >= 1, "iterations", self.iterations, "scales nothing", "Set it to 1 or more.")
        require(self.groups is None, "groups", self.groups, "does not go with a balanced assignment", "Set it to null.")

    @property
    def causal(self) -> bool:
        """Other tokens of the batch decide."""
        return False

    def build_at(self, site: RouterSite) -> SinkhornRouter:
        return SinkhornRouter(self, site)


class SinkhornRouter(TopKRouter):
    """The linear map of `topk`, another selection."""

    config: SinkhornConfig

    def add_selection_bias(self) -> None:
        """Refused: the assignment is balanced already."""
        Router.add_selection_bias(self)

    def selection_order(self, logits_TE: Tensor, score_TE: Tensor, ctx: TokenContext) -> Tensor:
        """The balanced assignment, in evaluation the logits themselves: a token is then on its own."""
        if not ctx.training:
            return logits_TE
        return balance(logits_TE, ctx.valid_T, self.config.iterations)


def balance(logits_TE: Tensor, valid_T: Tensor, iterations: int) -> Tensor:
    """[T, E] logarithm of the scaled matrix: rows sum to 1, columns to T_valid / E, up to convergence.

    ``pi = diag(a) exp(logits) diag(b)``, ``a`` and ``b`` in turn, in the logarithm, where nothing overflows. Padding
    has no mass.
    """
    logits_TE = logits_TE.double()
    masked_TE = logits_TE.masked_fill(~valid_T[:, None], -torch.inf)
    share = (valid_T.sum().clamp_min(1) / logits_TE.shape[1]).log()
    column_E = logits_TE.new_zeros(logits_TE.shape[1])
    for _ in range(iterations):
        row_T = -(logits_TE + column_E).logsumexp(1)
        column_E = share - (masked_TE + row_T[:, None]).logsumexp(0)
        column_E = torch.where(column_E.isfinite(), column_E, 0)  # no token at all
    return logits_TE + row_T[:, None] + column_E
