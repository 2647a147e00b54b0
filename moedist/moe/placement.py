"""Where experts live: logical id -> slot -> rank. Plan and report speak logical ids, dispatch speaks slots."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which experts each rank of the expert-parallel axis holds, in the order of its weights.

    Slot numbers run through rank 0's experts, then rank 1's, and so on.

    Attributes:
        expert_ids: per rank, the logical ids it holds; every expert on exactly one rank, ranks may hold unlike numbers.
    """

    expert_ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = sorted(expert for ids in self.expert_ids for expert in ids)
        assert held == list(range(len(held))), f"every expert lives on exactly one rank, got {self.expert_ids}"

    @classmethod
    def in_order(cls, num_experts: int, size: int) -> Placement:
        """Equal blocks in the order of ids: the default.

        >>> Placement.in_order(4, 2).expert_ids
        ((0, 1), (2, 3))
        """
        assert num_experts % size == 0, f"{num_experts} experts on {size} ranks"
        each = num_experts // size
        return cls(tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(size)))

    @functools.cached_property
    def num_experts(self) -> int:
        """E."""
        return sum(self.sizes)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Experts per rank."""
        return tuple(len(ids) for ids in self.expert_ids)

    @functools.cached_property
    def expert_of_slot(self) -> tuple[int, ...]:
        """Logical ids in the order of slots."""
        return tuple(expert for ids in self.expert_ids for expert in ids)

    @functools.cached_property
    def identity(self) -> bool:
        """Whether slot numbers are the logical ids."""
        return self.expert_of_slot == tuple(range(self.num_experts))

    def slots_first(self, value_E: Tensor) -> Tensor:
        """[E, ...] by logical id -> by slot."""
        return value_E if self.identity else value_E[self._on(value_E.device)[0]]

    def slot_of(self, expert_N: Tensor) -> Tensor:
        """Logical ids -> slots."""
        return expert_N if self.identity else self._on(expert_N.device)[1][expert_N]

    @functools.lru_cache  # noqa: B019 (a placement lives as long as its model)
    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        expert_of_slot = torch.tensor(self.expert_of_slot, device=device)
        return expert_of_slot, expert_of_slot.argsort()
