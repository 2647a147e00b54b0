"""What experts receive and owe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.moe.init import Draw


@dataclasses.dataclass(frozen=True)
class Source:
    """What rows are copies of.

    Attributes:
        x_TD: vectors of this rank.
        token_R: int64, which of them each row is; -1 at rows that are zeros.
    """

    x_TD: Tensor
    token_R: Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token vectors that lie at their experts, expert by expert.

    Attributes:
        x_RD: the vectors.
        gate_R: the weight of each row's output; 0 at rows that carry nothing.
        sizes: rows of each of this rank's experts, in the order of their weights; None where only the device knows
            them. Experts that must know ask `read_sizes`.
        ends_e: int32, the same on the device: where each expert's rows end. Rows behind the last end carry nothing:
            what is made of them, and their gradients, nobody reads.
        uniform: whether all sizes are equal by construction (fixed slots), so that the rows are a [e, R / e, D] block.
        source: what the rows are copies of, where that is on this rank: for those who would rather keep that for
            backward. Gradients go to the rows.
    """

    x_RD: Tensor
    gate_R: Tensor
    sizes: tuple[int, ...] | None
    ends_e: Tensor
    uniform: bool = False
    source: Source | None = None

    def read_sizes(self) -> tuple[int, ...]:
        """`sizes`; where only the device knows them, the host waits for it."""
        if self.sizes is not None:
            return self.sizes
        ends = self.ends_e.tolist()
        return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))


class Experts(nn.Module):
    """Experts of one rank.

    Attributes:
        expert_ids: their global ids, in the order of the weights.
    """

    expert_ids: tuple[int, ...]

    def forward(self, rows: Rows) -> Tensor:
        """[R, D]: ``gate * expert(x)`` row by row; experts may give another width than they take. Every parameter takes
        part, so that one without rows gets a zero gradient and not None. Rows behind the last end may hold anything."""
        raise NotImplementedError

    def note(self, device: torch.device, dtype: torch.dtype, uniform: bool) -> str | None:
        """What a run should say of how its experts are computed, as a sentence; None for nothing.

        Args:
            device, dtype: of the rows.
            uniform: whether rows come in fixed slots (`Rows.uniform`).
        """
        return None

    def keep(self, expert_ids: Sequence[int]) -> None:
        """Drops all experts but those with the given global ids, in the given order."""
        raise NotImplementedError

    def init_weights(self, draw: Draw) -> None:
        """Fills the parameters of each expert from draws named by its global id: it starts equal wherever it lives."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ExpertsConfig(Choice, path="moe.experts"):
    """One way to compute experts."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Experts:
        """All ``num_experts`` experts for [*, dim] vectors."""
        raise NotImplementedError

    def expert_parameters(self, dim: int) -> int:
        """Parameters of one expert."""
        raise NotImplementedError

    def expert_matmul_parameters(self, dim: int) -> int:
        """Parameters of one expert that a token is multiplied with: two FLOPs each in forward, four in backward."""
        raise NotImplementedError
