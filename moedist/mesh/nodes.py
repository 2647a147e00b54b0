"""Which ranks share a node: ranks are numbered node by node, and expert-parallel groups are blocks of neighbours.

So a group of experts lies inside one node where it fits, and the neighbours of a node are neighbours in it where it
spans several.
"""

from __future__ import annotations

import dataclasses

from torch.distributed.device_mesh import DeviceMesh

from moedist.mesh.axis import Axis, NodeGrid

ACROSS, INSIDE = "ep_across", "ep_inside"
"""Names of the axes of a `NodeGrid`."""


def nodes_per_ep_group(ep: int, ranks_per_node: int) -> int | None:
    """How many nodes each expert-parallel group of ``ep`` ranks spans; None where groups begin or end inside a node.

    >>> nodes_per_ep_group(8, 4), nodes_per_ep_group(2, 4), nodes_per_ep_group(3, 4)
    (2, 1, None)
    """
    if ranks_per_node % ep == 0:
        return 1
    return ep // ranks_per_node if ep % ranks_per_node == 0 else None


def lay_on_nodes(ep: Axis, device_mesh: DeviceMesh, ranks_per_node: int) -> Axis:
    """The expert-parallel axis with its grid of nodes; as it is where groups begin or end inside a node.

    Makes two process groups per rank where the axis spans nodes of several ranks, and none elsewhere: collective,
    called by every rank alike.

    Args:
        ep: the axis.
        device_mesh: of the same axis alone.
        ranks_per_node: ranks that share a node.
    """
    num_nodes = nodes_per_ep_group(ep.size, ranks_per_node)
    if num_nodes is None:
        return ep
    if num_nodes == 1:
        nodes = one_node(ep)
    elif num_nodes == ep.size:
        nodes = NodeGrid(across=dataclasses.replace(ep, name=ACROSS), inside=Axis(INSIDE))
    else:
        grid = device_mesh._unflatten(0, (num_nodes, ranks_per_node), (ACROSS, INSIDE))
        nodes = NodeGrid(Axis.of(grid[ACROSS], ACROSS), Axis.of(grid[INSIDE], INSIDE))
    return dataclasses.replace(ep, nodes=nodes)


def one_node(ep: Axis) -> NodeGrid:
    """The grid of a line that lies on one node."""
    return NodeGrid(across=Axis(ACROSS), inside=dataclasses.replace(ep, name=INSIDE))
