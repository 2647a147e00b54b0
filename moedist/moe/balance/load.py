"""The load loss of noisy top-k gating (Shazeer et al. 2017, appendix A, equations 8 to 11)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moedist.config import require
from moedist.moe.balance.contract import ScopedLossConfig
from moedist.moe.balance.importance import SquaredVariation
from moedist.moe.router.contract import Router, Routing
from moedist.moe.router.noisy import NoisyRouter


@dataclasses.dataclass(frozen=True)
class LoadConfig(ScopedLossConfig):
    """``CV(load)^2``, an expert's load being the sum over tokens of the probability that fresh noise would choose it.

    Counts have no gradient; this smooth estimate has. It needs the noise of ``router: noisy``.
    """

    coefficient: float = 0.01

    def check(self, router: Router) -> None:
        """Only a noisy router has a smooth load."""
        require(
            isinstance(router, NoisyRouter),
            "kind",
            "load",
            "needs the learned noise of the router",
            "Set moe/router=noisy, or balance by moe.balance.importance or switch.",
        )

    def build(self, num_experts: int) -> LoadLoss:  # noqa: D102
        return LoadLoss(self)


class LoadLoss(SquaredVariation):
    """Of the smooth load."""

    def terms(self, routing: Routing) -> Tensor:
        """The probabilities of being chosen."""
        assert routing.load_TE is not None, "checked with the config"
        return routing.load_TE
