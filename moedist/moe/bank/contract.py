"""Where rows and weights meet."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from moedist.config import Choice
from moedist.mesh import Axis
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.experts.contract import Experts
from moedist.moe.init import Draw
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan


class Bank(nn.Module):
    """``bank(x_TD, plan) -> out_TD``: a token's output is the sum over its kept pairs of ``gate * expert(x)``.

    Attributes:
        experts: this rank's experts.
        placement, ep: which experts live on which of these ranks.
        static: whether no shape depends on data, so that the layer compiles into one graph.
        may_spill: whether that is so, and rows may be left behind, where the caller allows it
            (`TokenContext.may_spill`).
    """

    experts: Experts
    placement: Placement
    ep: Axis
    static: bool = False
    may_spill: bool = False

    def forward(self, x_TD: Tensor, plan: CapacityPlan) -> Tensor:
        """[T, D] -> [T, D], or whatever width the experts give; zero for a token without a kept pair."""
        raise NotImplementedError

    def spilled(self, plan: CapacityPlan) -> Tensor | None:
        """0-dim int64: kept pairs of this rank whose rows are left behind (`TokenContext.may_spill`); None where that
        cannot be."""
        return None

    def spread(self, placement: Placement, ep: Axis) -> None:
        """Keeps this rank's experts and computes over the axis from now on.

        Raises:
            ConfigError: this bank cannot.
        """
        raise NotImplementedError

    def init_weights(self, draw: Draw) -> None:
        """The experts' own."""
        self.experts.init_weights(draw)


@dataclasses.dataclass(frozen=True)
class BankConfig(Choice, path="moe.bank"):
    """One way to bring rows and weights together."""

    def check_spread(self, ep: int) -> None:
        """Raises `ConfigError` where this bank cannot be spread over ``ep`` ranks."""

    def build(self, experts: Experts, dispatch: DispatchConfig) -> Bank:
        """A bank of all experts, for one device until it is spread."""
        raise NotImplementedError
