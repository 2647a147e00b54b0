"""How many bytes a layer's exchange sends, in closed form, for routing that is even.

Each of a token's K experts is as likely as any other: then the token needs one of ``m`` given experts of E with the
probability 1 - C(E - m, K) / C(E, K) (`share_reached`). Routing that is skewed, or limited to groups of experts, sends
less between nodes.

Left out are the numbers of rows that ranks tell each other before: 8 bytes for each expert, each rank and each node.
"""

from __future__ import annotations

import dataclasses
import math

from moedist.moe.dispatch.wire import EXACT, Wire


@dataclasses.dataclass(frozen=True)
class Batch:
    """What travels, and where: one layer, one rank, one micro-batch.

    Attributes:
        tokens: valid ones of the rank; all ranks have as many (T).
        dim: of a token's vector (D).
        num_experts: of the layer, over all ranks (E).
        experts_per_token: kept pairs per token (K).
        capacity: slots of an expert for one rank's pairs; None without a limit (C).
        ep: expert-parallel ranks.
        nodes: over which these lie, as many ranks on each.
        element_bytes: of an element of a vector where it is computed: 2 in bf16.
        gate_bytes: of a gate.
    """

    tokens: int
    dim: int
    num_experts: int
    experts_per_token: int
    capacity: int | None
    ep: int
    nodes: int
    element_bytes: int = 2
    gate_bytes: int = 4

    @property
    def ranks_per_node(self) -> int:
        """Of the expert-parallel group."""
        return self.ep // self.nodes

    @property
    def other_ranks(self) -> tuple[int, int]:
        """Of the group, beside this one: on its node, and on other nodes."""
        return self.ranks_per_node - 1, self.ep - self.ranks_per_node


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends to other ranks, in forward and backward together.

    Attributes:
        inside: to ranks of its own node.
        across: to other nodes.
    """

    inside: float
    across: float

    @property
    def total(self) -> float:
        """To all."""
        return self.inside + self.across


def share_reached(num_experts: int, experts_per_token: int, experts: int) -> float:
    """Share of tokens that have at least one of ``experts`` given experts among their K distinct ones.

    >>> share_reached(16, 1, 8), share_reached(4, 2, 2)
    (0.5, 0.8333333333333334)
    """
    missed = math.comb(num_experts - experts, experts_per_token) / math.comb(num_experts, experts_per_token)
    return 1 - missed


def there_and_back(rows: float, batch: Batch, gates: int, ids: int = 0, wire: Wire = EXACT) -> float:
    """Bytes of ``rows`` rows to their experts and of as many back, and of the gradients of both.

    Args:
        rows: that one rank sends, or as many as it sends on average.
        batch: for the sizes.
        gates: that travel with a row to its experts, and their gradients back.
        ids: slots that travel with a row to its experts, in whole elements of where it is computed.
        wire: in which the vectors travel.
    """
    vectors = 2 * sum(each.row_bytes(batch.dim, batch.element_bytes) for each in (wire, wire.of_gradients))
    return rows * (vectors + ids * batch.element_bytes + 2 * gates * batch.gate_bytes)
