"""Who the ranks are and how they talk. Imports torch only.

An `Axis` is one line of ranks along a named mesh axis; collectives take an axis and do nothing on one of size 1, so
the same code runs with and without a process group.
"""

from moedist.mesh.adopt import adopt_mesh
from moedist.mesh.axis import Axis
from moedist.mesh.mesh import FullyShard, Mesh, MeshConfig, close_mesh, join_mesh

__all__ = ["Axis", "FullyShard", "Mesh", "MeshConfig", "adopt_mesh", "close_mesh", "join_mesh"]
