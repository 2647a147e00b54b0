"""Fixed slots, equal splits: C slots for every expert on every rank, so that the host never waits (GShard's layout)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.config import require
from moedist.mesh import Axis
from moedist.moe.dispatch.contract import Arrived, WireConfig
from moedist.moe.dispatch.rows import Exchange, RowsToTokens, copy_to_rows
from moedist.moe.dispatch.traffic import Batch, Traffic, there_and_back
from moedist.moe.dispatch.wire import EXACT, Wire, rounded
from moedist.moe.experts.contract import Rows, Source
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan


@dataclasses.dataclass(frozen=True)
class PaddedConfig(WireConfig):
    """Row ``expert * C + slot``; empty slots travel as zeros.

    C is the plan's upper bound from the shapes, so all ranks must bring the same number of positions T (padding marked
    invalid). Without a limit C = T: every expert gets room for all tokens, E / (K * factor) times the rows of a factor.
    """

    @property
    def static(self) -> bool:
        """Every slot travels, used or not."""
        return True

    def note(self, num_experts: int, experts_per_token: int, dropless: bool, ep: Axis) -> str | None:
        """Without a limit, rows for all tokens at every expert."""
        if not dropless:
            return None
        return (
            f"padded dispatch without a capacity limit gives every expert room for all tokens: "
            f"{num_experts / experts_per_token:g} times the rows that are used; all_to_all sends those alone"
        )

    def room(self, batch: Batch) -> int:
        """A row per slot; without a limit a slot per expert and token."""
        return batch.num_experts * (batch.tokens if batch.capacity is None else batch.capacity)

    def traffic(self, batch: Batch) -> Traffic:
        """All slots."""
        per_rank = self.room(batch) // batch.ep
        return Traffic(
            *(there_and_back(per_rank * ranks, batch, gates=1, wire=self.wire) for ranks in batch.other_ranks)
        )

    def build(self, placement: Placement, ep: Axis) -> PaddedDispatcher:  # noqa: D102
        require(
            len(set(placement.sizes)) == 1,
            "kind",
            "padded",
            f"needs equally many experts on every rank, not {placement.sizes}",
            "Set moe.dispatch.kind to all_to_all, or place the experts evenly.",
        )
        return PaddedDispatcher(placement, ep, self.wire)


@dataclasses.dataclass(frozen=True)
class PaddedTicket:
    """What `PaddedDispatcher.combine` needs: the token of each slot (-1: empty) and the slot row of each pair."""

    token_R: Tensor
    row_N: Tensor
    token_N: Tensor
    pairs_per_token: int | None
    num_tokens: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class PaddedDispatcher:
    """Slots of all experts in order; every rank's block has the same size."""

    placement: Placement
    ep: Axis
    wire: Wire = EXACT

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[PaddedTicket]:
        """Tokens to slots, then one all-to-all."""
        num_tokens = x_TD.shape[0]
        capacity = num_tokens if plan.capacity is None else plan.capacity
        num_rows = self.placement.num_experts * capacity
        row_N = self.placement.slot_of(plan.expert_N) * capacity + plan.slot_N
        row_N = torch.where(plan.slot_N < 0, -1, row_N)
        copies = copy_to_rows(x_TD, plan, row_N, num_rows)
        x_RD, gate_R = copies.x_RD, copies.gate_R
        if self.ep.size > 1:
            x_RD, gate_R = Exchange.apply(self.ep, self.wire, None, None, x_RD, gate_R)
            x_RD, gate_R = self.swap(x_RD, self.ep.size), self.swap(gate_R, self.ep.size)
        else:
            x_RD = rounded(x_RD, self.wire)
        num_local = self.placement.sizes[self.ep.rank]
        size = self.ep.size * capacity
        rows = Rows(
            x_RD=x_RD,
            gate_R=gate_R,
            sizes=(size,) * num_local,
            ends_e=torch.arange(1, num_local + 1, device=row_N.device, dtype=torch.int32) * size,
            uniform=True,
            source=Source(x_TD, copies.token_R) if x_RD is copies.x_RD else None,
        )
        ticket = PaddedTicket(copies.token_R, row_N, plan.token_N, plan.pairs_per_token, num_tokens, capacity)
        return Arrived(rows, ticket)

    def combine(self, y_RD: Tensor, ticket: PaddedTicket) -> Tensor:
        """The same way back, then each token's sum."""
        if self.ep.size > 1:
            y_RD = self.swap(y_RD, self.placement.sizes[self.ep.rank])
            (y_RD,) = Exchange.apply(self.ep, self.wire, None, None, y_RD)
        else:
            y_RD = rounded(y_RD, self.wire)
        return RowsToTokens.apply(
            y_RD, ticket.token_R, ticket.row_N, ticket.token_N, ticket.pairs_per_token, ticket.num_tokens
        )

    def swap(self, rows: Tensor, outer: int) -> Tensor:
        """Blocks by (rank, expert) <-> by (expert, rank): a [outer, inner, C, ...] transpose of the first two dims."""
        inner = self.ep.size * self.placement.sizes[self.ep.rank] // outer
        blocks = rows.view(outer, inner, -1, *rows.shape[1:]) if rows.numel() else rows
        return blocks.transpose(0, 1).reshape(rows.shape) if rows.numel() else rows
