"""Which ranks share a node: ranks are numbered node by node, and expert-parallel groups are blocks of neighbours."""

from __future__ import annotations


def nodes_per_ep_group(ep: int, ranks_per_node: int) -> int | None:
    """How many nodes each expert-parallel group of ``ep`` ranks spans; None where groups begin or end inside a node.

    >>> nodes_per_ep_group(8, 4), nodes_per_ep_group(2, 4), nodes_per_ep_group(3, 4)
    (2, 1, None)
    """
    if ranks_per_node % ep == 0:
        return 1
    return ep // ranks_per_node if ep % ranks_per_node == 0 else None
