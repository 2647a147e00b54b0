"""Quantile balancing: the selection bias that gives each expert its share of the batch (J. Su 2026)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.config import require
from moedist.moe.balance.contract import BalanceBias, SelectionBiasConfig
from moedist.moe.context import TokenContext
from moedist.moe.plan import count
from moedist.moe.router.contract import Router, Routing

SMALLEST, LARGEST, PER_OCTAVE = -20, 4, 16
"""Shortfalls are counted in bins from 2 ** -20 to 2 ** 4, 16 to a factor of two, on either side of a bin around 0."""


@dataclasses.dataclass(frozen=True)
class QuantileConfig(SelectionBiasConfig):
    """Once per optimizer step, the bias that would have balanced it; used from the next step on.

    Choosing K of E experts for each of T tokens, T K / E tokens for each expert, with the largest sum of scores, is a
    linear program. Its dual has a price a_t for each token and a bias b_i for each expert:

        minimise over a, b:  K sum_t a_t - (T K / E) sum_i b_i + sum_ti max(0, s_ti + b_i - a_t)

    For given biases the best a_t lies between token t's K-th and (K+1)-th largest s_ti + b_i; the (K+1)-th is taken.
    For given prices the best b_i is a quantile over tokens: the K / E quantile of a_t - s_ti, at which T K / E tokens
    find expert i worth its price. A step takes each half once (J. Su 2026, "MoE: balance by optimal assignment",
    kexue.fm/archives/11619; Megatron-Core's ``quantile_balancing`` is the same, by micro-batch, without padding and
    group limits). There is no rate to tune.

    The quantile is taken over the valid tokens of the whole global batch: the shortfalls ``a_t - s_ti - b_i`` of each
    expert, whose quantile is the change of its bias, are counted in bins, in int64, and the counts are added up over
    micro-steps and ranks. So it is the same on every rank, at every layout and cut of the batch, and for any number of
    tokens. Bins are finest around 0, where the quantile comes to lie: a change is known to a sixteenth of its octave,
    or to 2 ** -20. Under group limits a shortfall is the larger of the expert's and its group's.

    Attributes:
        memory: share of the old bias in a moving average of biases; 0 for none.
    """

    memory: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.memory < 1, "memory", self.memory, "is no share", "Set it in [0, 1); 0 remembers nothing.")

    @property
    def finds_whole_bias(self) -> bool:
        """The bias that would have balanced the step, whatever moved it before."""
        return True

    def build(self, num_experts: int) -> QuantileRule:  # noqa: D102
        return QuantileRule(self, num_experts)


class QuantileRule(BalanceBias):
    """The update of one layer."""

    def __init__(self, config: QuantileConfig, num_experts: int):
        super().__init__()
        self.config, self.num_experts = config, num_experts

    def observe(self, router: Router, routing: Routing, ctx: TokenContext) -> Tensor:
        """int64 [E, B]: valid tokens by expert and bin of the shortfall."""
        short_TE = router.shortfall(routing)
        edge_B = bin_edges(short_TE.device)
        num_bins = edge_B.shape[0] + 1
        expert_E = torch.arange(self.num_experts, device=short_TE.device)
        place_TE = expert_E * num_bins + torch.bucketize(short_TE.double(), edge_B)
        valid_TE = ctx.valid_T[:, None].expand_as(place_TE)
        counts = count(place_TE.reshape(-1), self.num_experts * num_bins, valid_TE.reshape(-1))
        return counts.view(self.num_experts, num_bins)

    def forward(self, bias_E: Tensor, load_E: Tensor, observed: Tensor | None = None) -> Tensor:
        """fp32 [E]."""
        assert observed is not None, "the layer hands over what was observed"
        moved_E = bias_E.double() + (1 - self.config.memory) * quantile_of_bins(observed, load_E.sum())
        return (moved_E - moved_E.mean()).to(bias_E.dtype)


def bin_edges(device: torch.device) -> Tensor:
    """fp64 [B - 1], rising: powers of two and what is evenly between them in the logarithm, and their negatives."""
    num_steps = (LARGEST - SMALLEST) * PER_OCTAVE
    positive = torch.exp2(SMALLEST + torch.arange(num_steps + 1, device=device, dtype=torch.float64) / PER_OCTAVE)
    return torch.cat([-positive.flip(0), positive])


def quantile_of_bins(count_EB: Tensor, total: Tensor) -> Tensor:
    """fp64 [E]: of each row the value below which ``total / E`` of the counted lie; 0 where nothing was counted.

    Args:
        count_EB: int64, by the bins between `bin_edges`; what lies outside them counts as at the last edge.
        total: 0-dim int64.
    """
    num_experts, num_bins = count_EB.shape
    edge = bin_edges(count_EB.device)
    edge = torch.cat([edge[:1], edge, edge[-1:]])
    up_to_EB = count_EB.cumsum(1)
    # Integers: up_to < total / E, which no rounding can flip.
    bin_E1 = (up_to_EB * num_experts < total).sum(1, keepdim=True).clamp_max(num_bins - 1)
    inside_E = count_EB.gather(1, bin_E1)[:, 0]
    below_E = up_to_EB.gather(1, bin_E1)[:, 0] - inside_E
    share_E = (total / num_experts - below_E) / inside_E.clamp_min(1)
    low_E, high_E = edge[bin_E1[:, 0]], edge[bin_E1[:, 0] + 1]
    return torch.where(total > 0, low_E + share_E * (high_E - low_E), 0)
