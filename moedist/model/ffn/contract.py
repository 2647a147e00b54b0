"""What the feed-forward half of a block is: a module ``(x_BSD, TokenContext) -> FFNOutput``."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.moe.context import TokenContext
from moedist.moe.report import MoEReport

if TYPE_CHECKING:
    from moedist.moe.layer import MoEConfig


class FFNOutput(NamedTuple):
    """What a feed-forward module returns.

    Attributes:
        out_BSD: goes to the residual stream.
        report: of the MoE layer inside; None where there is none.
    """

    out_BSD: Tensor
    report: MoEReport | None


class FFN(nn.Module):
    """The base of every feed-forward module.

    Attributes:
        has_report: whether `forward` returns a report.
    """

    has_report: bool = False

    def forward(self, x_BSD: Tensor, context: TokenContext) -> FFNOutput:
        """[B, S, D] -> [B, S, D]; ``context`` is of the same T = B * S positions."""
        raise NotImplementedError

    def active_shares(self) -> dict[str, Fraction]:
        """The share of a child module's parameters (name relative to this module) that one token meets; 1 elsewhere."""
        return {}


@dataclasses.dataclass(frozen=True)
class FFNConfig(Choice, path="model.ffn"):
    """One kind of feed-forward module."""

    def check_causal(self, moe: MoEConfig | None) -> None:
        """Raises `ConfigError` where it would let a later token act on an earlier one.

        Args:
            moe: the run's MoE layer, of which an error speaks by its full key (``moe.router.kind``); None to look only
                at what the config brings itself, with keys below it.
        """

    def check_beside(self, moe: MoEConfig) -> None:
        """Raises `ConfigError` where what it brings itself does not go with the run's MoE layer."""

    def check_spread(self, ep: int, ranks_per_node: int | None = None) -> None:
        """Raises `ConfigError` where what it brings itself cannot be spread so; arguments as `MoEConfig.check_spread`
        has them."""

    def build(
        self,
        dim: int,
        *,
        layer: int,
        moe: MoEConfig,
        output_scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FFN:
        """Builds the module.

        Args:
            dim: model width (D).
            layer: index of the block, from 0.
            moe: the run's MoE layer.
            output_scale: factor on the first standard deviation of the projection into the residual stream.
            device: where.
            dtype: of the parameters.

        Raises:
            ConfigError: sizes that do not fit together.
        """
        raise NotImplementedError
