"""Once per node: a token crosses to each node that needs it in one copy, and spreads out to ranks and experts there.

On the way back every node sums what its experts made of a token before the sum crosses. (DeepSeek-V3,
arXiv:2412.19437, section 3.2.2, dispatches so over nodes and then over the ranks of each.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.config import require
from moedist.mesh import Axis
from moedist.mesh.collectives import all_to_all
from moedist.mesh.nodes import nodes_per_ep_group
from moedist.moe.dispatch.contract import Arrived, DispatchConfig
from moedist.moe.dispatch.rows import ID_TYPES, Exchange, RowsToTokens, TokensToRows, pair_of_row, take
from moedist.moe.dispatch.traffic import Batch, Traffic, share_reached, there_and_back
from moedist.moe.dispatch.wire import EXACT
from moedist.moe.experts.contract import Rows
from moedist.moe.placement import Placement
from moedist.moe.plan import CapacityPlan, fill_buckets


@dataclasses.dataclass(frozen=True)
class HierarchicalConfig(DispatchConfig):
    """One copy of a token per destination, however many of its experts are there.

    Attributes:
        once_per: ``node``: first between nodes, to the rank in this rank's place there, then inside the node, where
            each rank gets one copy. ``rank``: one exchange, and one copy for each rank. On one node these are the same.
    """

    once_per: Literal["node", "rank"] = "node"

    def note(self, num_experts: int, experts_per_token: int, dropless: bool, ep: Axis) -> str | None:
        """Where it saves nothing."""
        if ep.size > 1 and experts_per_token == 1:
            return "hierarchical dispatch of one expert per token sends as many rows as all_to_all, and asks for more"
        if ep.size > 1 and self.once_per == "node" and ep.nodes is not None and ep.nodes.across.size == 1:
            return (
                "hierarchical dispatch on one node: nothing crosses nodes, and each rank gets one copy of a token "
                "where all_to_all sends one per expert"
            )
        return None

    def check_nodes(self, ep: int, ranks_per_node: int) -> None:  # noqa: D102
        require(
            self.once_per == "rank" or nodes_per_ep_group(ep, ranks_per_node) is not None,
            "once_per",
            self.once_per,
            f"needs expert-parallel groups of whole nodes; groups of {ep} ranks begin or end inside a node of "
            f"{ranks_per_node}",
            f"Set mesh.ep to a divisor or a multiple of {ranks_per_node}, or moe.dispatch.once_per to rank.",
        )

    def traffic(self, batch: Batch) -> Traffic:
        """Between nodes one row per token and node that it needs; inside one per token that has come to the node and
        rank that it needs there. Gates and slots of its pairs travel with every row."""
        at_rank, at_node = batch.num_experts // batch.ep, batch.num_experts // batch.nodes
        beside, others = batch.other_ranks
        to_rank = batch.tokens * share_reached(batch.num_experts, batch.experts_per_token, at_rank)
        to_node = batch.tokens * share_reached(batch.num_experts, batch.experts_per_token, at_node)

        def sent(rows: float, most_pairs: int) -> float:
            pairs = min(batch.experts_per_token, most_pairs)
            return there_and_back(rows, batch, gates=pairs, ids=pairs)

        if self.once_per == "rank" or beside == 0 or others == 0:
            return Traffic(inside=sent(to_rank * beside, at_rank), across=sent(to_rank * others, at_rank))
        # Every rank passes on what has come from its place on each node.
        return Traffic(
            inside=sent(batch.nodes * to_rank * beside, at_rank), across=sent(to_node * (batch.nodes - 1), at_node)
        )

    def build(self, placement: Placement, ep: Axis) -> HierarchicalDispatcher:  # noqa: D102
        require(
            placement.num_experts <= torch.iinfo(torch.int16).max,
            "kind",
            "hierarchical",
            f"numbers experts in 16 bits, and there are {placement.num_experts}",
            "Set moe.dispatch.kind to all_to_all.",
        )
        if ep.size == 1:
            return HierarchicalDispatcher(placement, ep, levels=())
        require(
            self.once_per == "rank" or ep.nodes is not None,
            "once_per",
            self.once_per,
            "needs expert-parallel groups of whole nodes",
            "Set mesh.ep to a divisor or a multiple of mesh.ranks_per_node, or moe.dispatch.once_per to rank.",
        )
        ends = tuple(itertools.accumulate(placement.sizes, initial=0))
        if self.once_per == "rank" or ep.nodes is None or ep.nodes.along_one:
            return HierarchicalDispatcher(placement, ep, levels=(Level(ep, ends, per_rank(placement)),))
        across, inside = ep.nodes.across, ep.nodes.inside
        first = across.rank * inside.size
        return HierarchicalDispatcher(
            placement,
            ep,
            levels=(
                Level(across, ends[:: inside.size], per_node(placement, inside.size)),
                Level(
                    inside,
                    ends[first : first + inside.size + 1],
                    per_rank(placement)[first : first + inside.size],
                ),
            ),
        )


def per_rank(placement: Placement) -> tuple[int, ...]:
    """How many numbers each rank is told: of the rows that it gets, and of the pairs of each of its experts."""
    return tuple(1 + size for size in placement.sizes)


def per_node(placement: Placement, ranks_per_node: int) -> tuple[int, ...]:
    """How many numbers each node is told: of the rows that it gets, and what it will tell its ranks."""
    numbers = per_rank(placement)
    return tuple(1 + sum(numbers[first : first + ranks_per_node]) for first in range(0, len(numbers), ranks_per_node))


@dataclasses.dataclass(frozen=True)
class Level:
    """One exchange on the way to the experts.

    Attributes:
        axis: the ranks that take part.
        bounds: the first slot behind each rank of the axis, and the end of the last one's.
        told: how many numbers each rank of the axis is told before.
    """

    axis: Axis
    bounds: tuple[int, ...]
    told: tuple[int, ...]

    @property
    def most_slots(self) -> int:
        """Behind one rank of the axis; at least 1."""
        return max(1, *(end - first for first, end in itertools.pairwise(self.bounds)))


@dataclasses.dataclass(frozen=True)
class Copies:
    """One way from tokens to rows; what is a row at one level is a token at the next.

    Attributes:
        token_R: token of each row.
        row_N: rows of each token, ``per_token`` of them, -1 for none.
        num_tokens: where the rows come from.
    """

    token_R: Tensor
    row_N: Tensor
    per_token: int
    num_tokens: int

    def to_rows(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [R, D]."""
        return TokensToRows.apply(x_TD, self.token_R, self.row_N, None, self.per_token)

    def to_tokens(self, y_RD: Tensor) -> Tensor:
        """[R, D] -> [T, D]: each token's sum."""
        return RowsToTokens.apply(y_RD, self.token_R, self.row_N, None, self.per_token, self.num_tokens)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One exchange: what was sent, and how many rows to and from each rank of the axis."""

    copies: Copies
    axis: Axis
    send_sizes: list[int]
    receive_sizes: list[int]


@dataclasses.dataclass(frozen=True)
class HierarchicalTicket:
    """What `HierarchicalDispatcher.combine` needs.

    Attributes:
        crossings: the exchanges, in the order of dispatch. The first one's ``send_sizes`` are the rows that cross
            nodes, where there are two.
        at_experts: from the rows that have arrived to one for each expert that wants them.
    """

    crossings: tuple[Crossing, ...]
    at_experts: Copies


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of each row on its way, at most P: gate, and slot of the expert (-1: no pair)."""

    gate_RP: Tensor
    slot_RP: Tensor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of rows, on the host.

    Attributes:
        exchanged: of every level, to and from each rank of its axis.
        at_experts: of each of this rank's experts.
        at_experts_e: int64, the same on the device.
    """

    exchanged: list[tuple[list[int], list[int]]]
    at_experts: list[int]
    at_experts_e: Tensor


@dataclasses.dataclass(frozen=True)
class HierarchicalDispatcher:
    """Rows lie sorted by (rank of the axis, token) at every level; at the experts by (expert, arrival)."""

    placement: Placement
    ep: Axis
    levels: tuple[Level, ...]

    @property
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """The bounds of all nodes and of all ranks; of ranks alone where there is one level."""
        of_ranks = tuple(itertools.accumulate(self.placement.sizes, initial=0))
        return (*(level.bounds for level in self.levels[:-1]), *([of_ranks] if self.levels else []))

    def dispatch(self, x_TD: Tensor, plan: CapacityPlan) -> Arrived[HierarchicalTicket]:
        """Numbers of rows first, then level by level one copy per destination, then one per expert."""
        pairs = self.pairs_of(x_TD.shape[0], plan)
        sizes = self.tell_sizes(pairs.slot_RP, self.placement.slots_first(plan.kept_E))
        x_RD, crossings = x_TD, []
        for level, (send_sizes, receive_sizes) in zip(self.levels, sizes.exchanged, strict=True):
            copies, pairs = copy_once(pairs, level, sum(send_sizes))
            x_RD, gate_RP, slot_RP = Exchange.apply(
                level.axis,
                EXACT,
                send_sizes,
                receive_sizes,
                copies.to_rows(x_RD),
                pairs.gate_RP,
                pairs.slot_RP.to(ID_TYPES[x_TD.element_size()]),
            )
            pairs = Pairs(gate_RP, slot_RP.to(torch.int64))
            crossings.append(Crossing(copies, level.axis, send_sizes, receive_sizes))
        at_experts, gate_R = copy_to_experts(pairs, sum(self.placement.sizes[: self.ep.rank]), sizes)
        rows = Rows(
            x_RD=at_experts.to_rows(x_RD),
            gate_R=gate_R,
            sizes=tuple(sizes.at_experts),
            ends_e=sizes.at_experts_e.cumsum(0).to(torch.int32),
        )
        return Arrived(rows, HierarchicalTicket(tuple(crossings), at_experts))

    def combine(self, y_RD: Tensor, ticket: HierarchicalTicket) -> Tensor:
        """The same way back: at every level the sum of what one token's copies have become, then the sum crosses."""
        y_RD = ticket.at_experts.to_tokens(y_RD)
        for crossing in reversed(ticket.crossings):
            (y_RD,) = Exchange.apply(crossing.axis, EXACT, crossing.receive_sizes, crossing.send_sizes, y_RD)
            y_RD = crossing.copies.to_tokens(y_RD)
        return y_RD

    def pairs_of(self, num_tokens: int, plan: CapacityPlan) -> Pairs:
        """Each token's pairs side by side: its K choices, or where it may have any number a place for every expert."""
        slot_N = torch.where(plan.slot_N < 0, -1, self.placement.slot_of(plan.expert_N))
        if plan.pairs_per_token is not None:
            shape = num_tokens, plan.pairs_per_token
            return Pairs(plan.gate_N.view(shape), slot_N.view(shape))
        shape = num_tokens, self.placement.num_experts
        place_N = torch.where(slot_N < 0, -1, plan.token_N * shape[1] + slot_N)
        return carried(plan.gate_N, slot_N, place_N, shape)

    def tell_sizes(self, slot_TP: Tensor, kept_E: Tensor) -> Sizes:
        """How many rows there will be: each rank tells those it sends to, level by level, and the host waits once.

        A destination is told how many rows it gets, then what it needs to tell its own destinations, down to the pairs
        of each expert.
        """
        told = self.numbers_to_tell(slot_TP, kept_E)
        numbers = []
        for level in self.levels:
            own = level.told[level.axis.rank]
            heard = all_to_all(told, level.axis, list(level.told), [own] * level.axis.size).view(level.axis.size, own)
            heads = tuple(itertools.accumulate(level.told[:-1], initial=0))
            numbers += [told[constant(heads, told)], heard[:, 0]]
            told = heard.sum(0)[1:]
        host = iter(torch.cat([*numbers, told]).tolist())
        on_host = [list(itertools.islice(host, part.shape[0])) for part in (*numbers, told)]
        *exchanged, at_experts = on_host
        return Sizes(list(zip(exchanged[::2], exchanged[1::2], strict=True)), at_experts, told)

    def numbers_to_tell(self, slot_TP: Tensor, kept_E: Tensor) -> Tensor:
        """int64: for each node its rows, then for each of its ranks that one's rows and the pairs of its experts; no
        nodes where there is one level, and the pairs alone where there is none."""
        rows = [reached(slot_TP, bounds).sum(0) for bounds in self.cuts]
        order = telling_order(self.placement.sizes, tuple(len(bounds) - 1 for bounds in self.cuts))
        return torch.cat([*rows, kept_E])[constant(order, kept_E)]


@functools.lru_cache
def telling_order(sizes: tuple[int, ...], parts: tuple[int, ...]) -> tuple[int, ...]:
    """Where the numbers to tell stand in (rows of every part, cut by cut; pairs of every slot).

    Args:
        sizes: slots of each rank.
        parts: into how many parts each level cuts the ranks: (nodes, ranks), (ranks,) or ().

    >>> telling_order((2, 1), (2,)), telling_order((1, 1, 1, 1), (2, 4))
    ((0, 2, 3, 1, 4), (0, 2, 6, 3, 7, 1, 4, 8, 5, 9))
    """
    slot, first_slot = sum(parts), []
    for size in sizes:
        first_slot.append(slot)
        slot += size
    order: list[int] = []
    for rank, size in enumerate(sizes):
        first_part = 0
        for number in parts:
            part, rest = divmod(rank * number, len(sizes))
            order += [first_part + part] if rest == 0 else []
            first_part += number
        order += range(first_slot[rank], first_slot[rank] + size)
    return tuple(order)


def constant(numbers: tuple[int, ...], beside: Tensor) -> Tensor:
    """int64 on the device of ``beside``, made once there: a copy from the host makes it wait."""
    return _made_once(numbers, beside.device, getattr(beside, "fake_mode", None))


@functools.lru_cache
def _made_once(numbers: tuple[int, ...], device: torch.device, fake_mode: object) -> Tensor:
    # A fake tensor (torch.compile's, or of a plan without data) goes with those of its own mode alone.
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def part_of(slot: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """int64: the part behind whose bounds a slot lies; ``len(bounds) - 1``, one past the last, for slot -1."""
    num_parts = len(bounds) - 1
    part = torch.bucketize(slot, constant(bounds[1:], slot), right=True)
    return torch.where(slot < 0, num_parts, part)


def reached(slot_TP: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """[T, G] bool: whether a token has a pair behind each part's bounds."""
    num_parts = len(bounds) - 1
    reached_TG = torch.zeros(slot_TP.shape[0], num_parts + 1, dtype=torch.bool, device=slot_TP.device)
    return reached_TG.scatter_(1, part_of(slot_TP, bounds), True)[:, :num_parts]


def copy_once(pairs: Pairs, level: Level, num_rows: int) -> tuple[Copies, Pairs]:
    """One row for each token and rank of the axis that it needs, by (rank, token), and the pairs that go with it."""
    slot_TP = pairs.slot_RP
    num_tokens, most_pairs = slot_TP.shape
    reached_GT = reached(slot_TP, level.bounds).t()
    row_GT = torch.where(reached_GT, reached_GT.reshape(-1).cumsum(0).view(reached_GT.shape) - 1, -1)
    token_R = pair_of_row(row_GT.reshape(-1), num_rows) % max(num_tokens, 1)
    row_TC = row_GT.t()
    if level.axis.size > most_pairs:  # no token needs more ranks than it has pairs
        row_TC = row_TC.sort(dim=1, descending=True).values[:, :most_pairs]
    copies = Copies(token_R, row_TC.reshape(-1), row_TC.shape[1], num_tokens)

    part_TP = part_of(slot_TP, level.bounds)
    row_TP = F.pad(row_GT, (0, 0, 0, 1), value=-1).t().gather(1, part_TP)
    # A pair keeps its column, or where a part has fewer slots than a token has pairs, its slot is one.
    width = min(most_pairs, level.most_slots)
    if width == most_pairs:
        column_TP = torch.arange(most_pairs, device=slot_TP.device)
    else:
        column_TP = slot_TP - constant((*level.bounds[:-1], 0), slot_TP)[part_TP]
    place_N = torch.where(row_TP < 0, -1, row_TP * width + column_TP).view(-1)
    return copies, carried(pairs.gate_RP.view(-1), slot_TP.view(-1), place_N, (num_rows, width))


def carried(gate_N: Tensor, slot_N: Tensor, place_N: Tensor, shape: tuple[int, int]) -> Pairs:
    """Pairs at their places (-1: none) in a table of ``shape``."""
    pair_N = pair_of_row(place_N, shape[0] * shape[1])
    gate_N = TokensToRows.apply(gate_N, pair_N, place_N, None, 1)
    return Pairs(gate_N.view(shape), (take(slot_N + 1, pair_N) - 1).view(shape))


def copy_to_experts(pairs: Pairs, first_slot: int, sizes: Sizes) -> tuple[Copies, Tensor]:
    """One row for each pair that has arrived, by (expert, arrival), and its gate.

    Args:
        pairs: of rows whose experts are all here.
        first_slot: of this rank.
        sizes: of the experts.
    """
    num_arrived, width = pairs.slot_RP.shape
    sizes_e, num_experts = sizes.at_experts_e, len(sizes.at_experts)
    slot_N = pairs.slot_RP.view(-1)
    expert_N = torch.where(slot_N < 0, -1, slot_N - first_slot)
    place_N, _ = fill_buckets(expert_N, num_experts, None)
    first_row_e = F.pad(sizes_e.cumsum(0) - sizes_e, (0, 1))
    row_N = torch.where(slot_N < 0, -1, first_row_e[expert_N] + place_N)
    pair_R = pair_of_row(row_N, sum(sizes.at_experts))
    gate_R = TokensToRows.apply(pairs.gate_RP.view(-1), pair_R, row_N, None, 1)
    return Copies(pair_R // max(width, 1), row_N, width, num_arrived), gate_R
