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
        num_experts: E.
        sizes: experts per rank.
        expert_of_slot: logical ids in the order of slots.
        identity: whether slot numbers are the logical ids.
    """

    expert_ids: tuple[tuple[int, ...], ...]
    # Derived at once: torch.compile cannot trace the lock of a cached property.
    num_experts: int = dataclasses.field(init=False, repr=False, compare=False)
    sizes: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    expert_of_slot: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    identity: bool = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expert_of_slot = tuple(expert for ids in self.expert_ids for expert in ids)
        in_order = tuple(range(len(expert_of_slot)))
        assert tuple(sorted(expert_of_slot)) == in_order, (
            f"every expert lives on exactly one rank, got {self.expert_ids}"
        )
        object.__setattr__(self, "num_experts", len(expert_of_slot))
        object.__setattr__(self, "sizes", tuple(len(ids) for ids in self.expert_ids))
        object.__setattr__(self, "expert_of_slot", expert_of_slot)
        object.__setattr__(self, "identity", expert_of_slot == in_order)

    @classmethod
    def in_order(cls, num_experts: int, size: int) -> Placement:
        """Equal blocks in the order of ids: the default.

        >>> Placement.in_order(4, 2).expert_ids
        ((0, 1), (2, 3))
        """
        assert num_experts % size == 0, f"{num_experts} experts on {size} ranks"
        each = num_experts // size
        return cls(tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(size)))

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
