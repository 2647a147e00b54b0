"""One line of ranks along a named mesh axis."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Axis:
    """This rank's line along a mesh axis.

    Holds the process group's name and never the group: an object kept by an autograd graph may outlive the group, and
    a group kept alive by a graph aborts the process at exit.

    Attributes:
        name: ``dp`` (data parallel: all ranks that hold a copy of the dense weights), ``ep`` (expert parallel),
            ``edp`` (expert data parallel: the ranks that hold the same experts), and where weights are cut ``fsdp``
            (the ranks among which the model lies once) and ``replicate`` (the ranks that hold the same pieces). For
            ``ep_across`` and ``ep_inside`` see `NodeGrid`.
        size: number of ranks on the line.
        rank: this rank's place on the line, 0 to ``size - 1``.
        group_name: name of the process group; None for a process on its own.
        nodes: how the line lies on nodes, for ``ep``; None where nobody has said it, or where the line begins or ends
            inside a node.
    """

    name: str
    size: int = 1
    rank: int = 0
    group_name: str | None = None
    nodes: NodeGrid | None = None

    @classmethod
    def of(cls, device_mesh: DeviceMesh, name: str) -> Axis:
        """The line of a one-axis ``device_mesh`` (a slice or a flattened mesh)."""
        return cls(name, device_mesh.size(), device_mesh.get_local_rank(), device_mesh.get_group().group_name)

    @property
    def group(self) -> ProcessGroup:
        """The live process group; asked for at each use, never stored."""
        assert self.group_name is not None, f"axis {self.name} has no process group"
        return process_group(self.group_name)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks on the line, in its order."""
        return (0,) if self.group_name is None else tuple(dist.get_process_group_ranks(self.group))


@dataclasses.dataclass(frozen=True)
class NodeGrid:
    """A line of ranks as a grid [nodes, ranks of a node], node after node.

    Attributes:
        across: the ranks in this rank's place on every node of the line (``ep_across``), in the order of the nodes.
        inside: the ranks of the line on this rank's node (``ep_inside``).
    """

    across: Axis
    inside: Axis

    @property
    def along_one(self) -> bool:
        """Whether one of the two is the whole line: it lies on one node, or has one rank on each."""
        return 1 in (self.across.size, self.inside.size)


def process_group(name: str) -> ProcessGroup:
    """The live process group of a name."""
    return _resolve_process_group(name)  # type: ignore[arg-type]
