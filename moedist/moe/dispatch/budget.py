"""Packed rows in blocks of one fixed size: nothing is dropped and the host never waits, as long as a budget holds.

How many rows go from a rank to another is known to the device alone. A collective wants to know it from the host, so
all_to_all waits for it. Here every rank has room for a fixed number of rows from every other; where they do not fit,
the device knows it from the plan, before any row moves, and whoever allowed it throws the step away
(`moedist.moe.context.TokenContext.may_spill`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.config import require
from moedist.mesh import Axis
from moedist.moe.capacity import exact
from moedist.moe.dispatch.all_to_all import AllToAllConfig, AllToAllDispatcher, AllToAllTicket
from moedist.moe.dispatch.contract import Arrived, WireConfig
from moedist.moe.dispatch.rows import ID_TYPES, Exchange, Reorder, copy_to_rows
from moedist.moe.dispatch.traffic import Batch, Traffic, there_and_back
from moedist.moe.dispatch.wire import rounded
from moedist.moe.experts.contract import Rows
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan, count


@dataclasses.dataclass(frozen=True)
class BudgetConfig(WireConfig):
    """A block of equal size from every rank to every rank, in one all-to-all each way; what is not used of it is zeros.

    All ranks must bring the same number of positions T (padding marked invalid). Who does not allow rows to be left
    behind gets them all, by the blocks of all_to_all.

    Attributes:
        factor: size of a block, as a multiple of the even share ``N / W`` of a rank's N pairs: a rank has room for
            ``factor * N`` rows. W (`mesh.ep`) holds whatever comes.
    """

    factor: float = 1.5

    def __post_init__(self) -> None:
        require(
            self.factor >= 1,
            "factor",
            self.factor,
            "leaves no room for the even share of pairs",
            "Set it to 1 or more; up to mesh.ep, from which on everything fits.",
        )

    @property
    def may_spill(self) -> bool:
        """Where a block is too small."""
        return True

    def block(self, num_pairs: int, num_ranks: int, most: int | None) -> int:
        """Rows from a rank to a rank, from the shapes alone: room for the share, and never more than can come.

        Args:
            num_pairs: of a rank (N).
            num_ranks: of the expert-parallel group (W).
            most: rows that a rank's experts take from a rank under a capacity limit; None without one.
        """
        factor = exact(self.factor)
        share = -(-factor.numerator * num_pairs // (factor.denominator * num_ranks))
        return min(share, num_pairs, num_pairs if most is None else most)

    def block_of(self, plan: CapacityPlan, placement: Placement) -> int:
        """`block` for a plan."""
        most = None if plan.capacity is None else placement.sizes[0] * plan.capacity
        return self.block(plan.token_N.shape[0], len(placement.sizes), most)

    def spilled(self, plan: CapacityPlan, placement: Placement) -> Tensor:
        """See the contract."""
        to_rank_W = placement.slots_first(plan.kept_E).view(len(placement.sizes), -1).sum(1)
        return (to_rank_W - self.block_of(plan, placement)).clamp_min(0).sum()

    def note(self, num_experts: int, experts_per_token: int, dropless: bool, ep: Axis) -> str | None:
        """What happens where the budget does not hold."""
        if ep.size == 1:
            return None
        return (
            f"budget dispatch has room for {self.factor:g} times the pairs of a rank, in equal parts from every rank; "
            "a step that needs more is thrown away and run again without a bound (train/spilled_steps)"
        )

    def room(self, batch: Batch) -> int:
        """Whole blocks."""
        most = None if batch.capacity is None else batch.num_experts // batch.ep * batch.capacity
        return batch.ep * self.block(batch.tokens * batch.experts_per_token, batch.ep, most)

    def traffic(self, batch: Batch) -> Traffic:
        """Whole blocks, and with each row the place of its expert."""
        per_rank = self.room(batch) // batch.ep
        return Traffic(
            *(there_and_back(per_rank * ranks, batch, gates=1, ids=1, wire=self.wire) for ranks in batch.other_ranks)
        )

    def build(self, placement: Placement, ep: Axis) -> BudgetDispatcher:  # noqa: D102
        require(
            len(set(placement.sizes)) == 1,
            "kind",
            "budget",
            f"needs equally many experts on every rank, not {placement.sizes}",
            "Set moe.dispatch.kind to all_to_all, or place the experts evenly.",
        )
        return BudgetDispatcher(
            self, placement, ep, AllToAllConfig(exchange_dtype=self.exchange_dtype).build(placement, ep)
        )


@dataclasses.dataclass(frozen=True)
class BudgetDispatcher:
    """Rows lie by (rank, expert) in their blocks, and packed by (expert, rank) at the experts, where what the blocks
    have left over comes last."""

    config: BudgetConfig
    placement: Placement
    ep: Axis
    packed: AllToAllDispatcher

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[AllToAllTicket]:
        """Rows, each with the place of its expert, so that no counts need be told before."""
        if not plan.may_spill:
            return self.packed.dispatch(x_TD, plan)
        block = self.config.block_of(plan, self.placement)
        row_N, place_N = self.rows_of(plan, block)
        copies = copy_to_rows(x_TD, plan, row_N, self.ep.size * block)
        x_RD, gate_R = copies.x_RD, copies.gate_R
        if self.ep.size == 1:
            x_RD = rounded(x_RD, self.config.wire)
            kept_e, by_expert, by_source = self.placement.slots_first(plan.kept_E), None, None
        else:
            # 0 stands for a row that carries nothing, as `take` gives it; experts' places count from 1.
            place_R = torch.where(copies.pair_R < 0, 0, 1 + place_N[copies.pair_R])
            x_RD, gate_R, place_R = Exchange.apply(
                self.ep, self.config.wire, None, None, x_RD, gate_R, place_R.to(ID_TYPES[x_TD.element_size()])
            )
            kept_e, by_expert, by_source = self.expert_order(place_R.to(torch.int64))
            x_RD, gate_R = Reorder.apply(x_RD, by_expert, by_source), Reorder.apply(gate_R, by_expert, by_source)
        rows = Rows(x_RD=x_RD, gate_R=gate_R, sizes=None, ends_e=kept_e.cumsum(0).to(torch.int32))
        ticket = AllToAllTicket(
            token_R=copies.token_R,
            row_N=row_N,
            token_N=plan.token_N,
            pairs_per_token=plan.pairs_per_token,
            num_tokens=x_TD.shape[0],
            by_expert=by_expert,
            by_source=by_source,
            send_sizes=None,
            receive_sizes=None,
        )
        return Arrived(rows, ticket)

    def combine(self, y_RD: Tensor, ticket: AllToAllTicket) -> Tensor:
        """The same way back, then each token's sum."""
        return self.packed.combine(y_RD, ticket)

    def rows_of(self, plan: CapacityPlan, block: int) -> tuple[Tensor, Tensor]:
        """int64 [N] twice: the row of each pair, -1 for one that does not travel, and the place of its expert among
        those of its rank."""
        num_local = self.placement.sizes[0]
        kept_We = self.placement.slots_first(plan.kept_E).view(self.ep.size, num_local)
        first_We = kept_We.cumsum(1) - kept_We
        slot_N = self.placement.slot_of(plan.expert_N)
        in_block_N = first_We.view(-1)[slot_N] + plan.slot_N
        travels_N = (plan.slot_N >= 0) & (in_block_N < block)
        return torch.where(travels_N, slot_N // num_local * block + in_block_N, -1), slot_N % num_local

    def expert_order(self, place_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [e] rows of each expert, and [R] twice: the index that brings received rows to their experts, those
        that carry nothing last, and its inverse. ``place_R`` counts from 1."""
        num_local = self.placement.sizes[0]
        expert_R = torch.where(place_R == 0, num_local, place_R - 1)
        by_expert = expert_R.sort(stable=True).indices
        row_R = torch.arange(place_R.shape[0], device=place_R.device)
        by_source = torch.empty_like(by_expert).scatter_(0, by_expert, row_R)
        return count(expert_R, num_local + 1)[:-1], by_expert, by_source
