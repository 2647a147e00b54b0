"""Packed rows, uneven splits: nothing is padded, and the host waits once a layer for the sizes (Hwang et al. 2023)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.mesh import Axis
from moedist.mesh.collectives import all_to_all
from moedist.moe.dispatch.contract import Arrived, WireConfig
from moedist.moe.dispatch.rows import Exchange, Reorder, RowsToTokens, copy_to_rows
from moedist.moe.dispatch.traffic import Batch, Traffic, there_and_back
from moedist.moe.dispatch.wire import EXACT, Wire, rounded
from moedist.moe.experts.contract import Rows, Source
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan


@dataclasses.dataclass(frozen=True)
class AllToAllConfig(WireConfig):
    """Kept pairs only, in one all-to-all of uneven blocks each way."""

    def traffic(self, batch: Batch) -> Traffic:
        """A row per pair."""
        per_rank = batch.tokens * batch.experts_per_token / batch.ep
        return Traffic(
            *(there_and_back(per_rank * ranks, batch, gates=1, wire=self.wire) for ranks in batch.other_ranks)
        )

    def build(self, placement: Placement, ep: Axis) -> AllToAllDispatcher:  # noqa: D102
        return AllToAllDispatcher(placement, ep, self.wire)


@dataclasses.dataclass(frozen=True)
class AllToAllTicket:
    """What `AllToAllDispatcher.combine` needs.

    Attributes:
        token_R: token of each sent row (R here counts sent rows). row_N: sent row of each pair, -1 for none.
        by_expert, by_source: the received rows' order at the experts, and back; None where they are one order.
        send_sizes, receive_sizes: rows to and from each rank; None for equal blocks.
    """

    token_R: Tensor
    row_N: Tensor
    token_N: Tensor
    pairs_per_token: int | None
    num_tokens: int
    by_expert: Tensor | None
    by_source: Tensor | None
    send_sizes: list[int] | None
    receive_sizes: list[int] | None


@dataclasses.dataclass(frozen=True)
class AllToAllDispatcher:
    """Rows lie sorted by (slot of the expert, slot of the pair); rank blocks are cut from that."""

    placement: Placement
    ep: Axis
    wire: Wire = EXACT

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[AllToAllTicket]:
        """Counts first, then rows."""
        kept_E = self.placement.slots_first(plan.kept_E)
        arriving_We = self.exchange_counts(kept_E)
        send_sizes, arriving = self.read_sizes(kept_E, arriving_We)
        receive_sizes = [sum(sizes) for sizes in arriving]

        first_row_E = kept_E.cumsum(0) - kept_E
        row_N = first_row_E[self.placement.slot_of(plan.expert_N)] + plan.slot_N
        row_N = torch.where(plan.slot_N < 0, -1, row_N)
        copies = copy_to_rows(x_TD, plan, row_N, sum(send_sizes))
        x_RD, gate_R = copies.x_RD, copies.gate_R
        by_expert = by_source = None
        if self.ep.size > 1:
            x_RD, gate_R = Exchange.apply(self.ep, self.wire, send_sizes, receive_sizes, x_RD, gate_R)
            by_expert, by_source = self.expert_order(arriving_We, sum(receive_sizes))
            x_RD, gate_R = Reorder.apply(x_RD, by_expert, by_source), Reorder.apply(gate_R, by_expert, by_source)
        else:
            x_RD = rounded(x_RD, self.wire)
        rows = Rows(
            x_RD=x_RD,
            gate_R=gate_R,
            sizes=tuple(sum(sizes) for sizes in zip(*arriving, strict=True)),
            ends_e=arriving_We.sum(0).cumsum(0).to(torch.int32),
            source=Source(x_TD, copies.token_R) if x_RD is copies.x_RD else None,
        )
        ticket = AllToAllTicket(
            token_R=copies.token_R,
            row_N=row_N,
            token_N=plan.token_N,
            pairs_per_token=plan.pairs_per_token,
            num_tokens=x_TD.shape[0],
            by_expert=by_expert,
            by_source=by_source,
            send_sizes=send_sizes,
            receive_sizes=receive_sizes,
        )
        return Arrived(rows, ticket)

    def combine(self, y_RD: Tensor, ticket: AllToAllTicket) -> Tensor:
        """The same way back, then each token's sum."""
        if self.ep.size > 1:
            y_RD = Reorder.apply(y_RD, ticket.by_source, ticket.by_expert)
            (y_RD,) = Exchange.apply(self.ep, self.wire, ticket.receive_sizes, ticket.send_sizes, y_RD)
        else:
            y_RD = rounded(y_RD, self.wire)
        return RowsToTokens.apply(
            y_RD, ticket.token_R, ticket.row_N, ticket.token_N, ticket.pairs_per_token, ticket.num_tokens
        )

    def exchange_counts(self, kept_E: Tensor) -> Tensor:
        """int64 [W, e]: rows that each rank sends to each of this rank's experts."""
        each = self.placement.sizes
        received = all_to_all(kept_E, self.ep, list(each), [each[self.ep.rank]] * self.ep.size)
        return received.view(self.ep.size, each[self.ep.rank])

    def read_sizes(self, kept_E: Tensor, arriving_We: Tensor) -> tuple[list[int], list[list[int]]]:
        """Rows sent to each rank, and ``arriving_We``, on the host: the one wait of the layer."""
        host = torch.cat([kept_E, arriving_We.reshape(-1)]).tolist()
        kept, arriving = host[: kept_E.shape[0]], host[kept_E.shape[0] :]
        ends = [sum(self.placement.sizes[: rank + 1]) for rank in range(self.ep.size)]
        send_sizes = [sum(kept[end - size : end]) for end, size in zip(ends, self.placement.sizes, strict=True)]
        num_local = self.placement.sizes[self.ep.rank]
        return send_sizes, [arriving[rank * num_local : (rank + 1) * num_local] for rank in range(self.ep.size)]

    @staticmethod
    def expert_order(arriving_We: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Received rows lie by (source rank, expert); experts want them by (expert, source rank).

        Returns:
            int64 [R] index that reorders them, and its inverse.
        """
        num_local = arriving_We.shape[1]
        block = torch.arange(arriving_We.numel(), device=arriving_We.device)
        block_R = block.repeat_interleave(arriving_We.view(-1), output_size=num_rows)
        by_expert = (block_R % max(num_local, 1)).sort(stable=True).indices
        by_source = torch.empty_like(by_expert)
        by_source[by_expert] = torch.arange(num_rows, device=by_expert.device)
        return by_expert, by_source
