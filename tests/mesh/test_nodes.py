"""How lines of ranks lie on nodes, drawn by hand: groups of experts inside a node first, then over neighbours."""

from __future__ import annotations

import pytest

from moedist.config import ConfigError
from moedist.mesh import Mesh, MeshConfig
from moedist.mesh.fake import fake_mesh


def drawn(text: str) -> set[tuple[int, ...]]:
    """``"0 1 | 2 3"``: lines of ranks; a double bar is where a node ends."""
    return {tuple(map(int, line.split())) for line in text.replace("||", "|").split("|")}


def lines(config: MeshConfig, world_size: int) -> dict[str, set[tuple[int, ...]]]:
    """All lines of each axis, as every rank of a world sees its own."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for rank in range(world_size):
        with fake_mesh(config, rank, world_size) as mesh:
            for axis in mesh.axes():
                assert axis.ranks[axis.rank] == rank
                found.setdefault(axis.name, set()).add(axis.ranks)
    return found


LAYOUTS = {
    # Two nodes of two ranks: 0 1 || 2 3
    "2 x 2, ep inside": (
        MeshConfig(ep=2, fsdp=2, ranks_per_node=2),
        {"dp": "0 1 2 3", "ep": "0 1 || 2 3", "edp": "0 2 | 1 3", "fsdp": "0 1 || 2 3", "replicate": "0 2 | 1 3"},
    ),
    "2 x 2, ep over both": (
        MeshConfig(ep=4, ranks_per_node=2),
        {
            "dp": "0 1 2 3",
            "ep": "0 1 2 3",
            "ep_inside": "0 1 || 2 3",
            "ep_across": "0 2 | 1 3",
            "edp": "0 | 1 || 2 | 3",
        },
    ),
    "2 x 2, no ep": (
        MeshConfig(fsdp=2, ranks_per_node=2),
        {"dp": "0 1 2 3", "ep": "0 | 1 || 2 | 3", "edp": "0 1 2 3", "fsdp": "0 1 || 2 3", "replicate": "0 2 | 1 3"},
    ),
    # Two nodes of four: 0 1 2 3 || 4 5 6 7
    "2 x 4, ep inside": (
        MeshConfig(ep=2, fsdp=4, ranks_per_node=4),
        {
            "dp": "0 1 2 3 4 5 6 7",
            "ep": "0 1 | 2 3 || 4 5 | 6 7",
            "edp": "0 2 4 6 | 1 3 5 7",
            "fsdp": "0 1 2 3 || 4 5 6 7",
            "replicate": "0 4 | 1 5 | 2 6 | 3 7",
        },
    ),
    "2 x 4, ep over both": (
        MeshConfig(ep=8, fsdp=8, ranks_per_node=4),
        {
            "dp": "0 1 2 3 4 5 6 7",
            "ep": "0 1 2 3 4 5 6 7",
            "ep_inside": "0 1 2 3 || 4 5 6 7",
            "ep_across": "0 4 | 1 5 | 2 6 | 3 7",
            "edp": "0 | 1 | 2 | 3 || 4 | 5 | 6 | 7",
            "fsdp": "0 1 2 3 4 5 6 7",
            "replicate": "0 | 1 | 2 | 3 || 4 | 5 | 6 | 7",
        },
    ),
    # Four nodes of two: 0 1 || 2 3 || 4 5 || 6 7
    "4 x 2, ep over two": (
        MeshConfig(ep=4, fsdp=8, ranks_per_node=2),
        {
            "dp": "0 1 2 3 4 5 6 7",
            "ep": "0 1 2 3 || 4 5 6 7",
            "ep_inside": "0 1 || 2 3 || 4 5 || 6 7",
            "ep_across": "0 2 | 1 3 || 4 6 | 5 7",
            "edp": "0 4 | 1 5 | 2 6 | 3 7",
            "fsdp": "0 1 2 3 4 5 6 7",
            "replicate": "0 | 1 || 2 | 3 || 4 | 5 || 6 | 7",
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_lines_on_nodes(name: str):
    config, picture = LAYOUTS[name]
    world_size = max(map(max, drawn(picture["dp"]))) + 1
    assert lines(config, world_size) == {axis: drawn(text) for axis, text in picture.items()}


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "grid"),
    [(1, 2, (1, 1)), (2, 2, (1, 2)), (4, 2, (2, 2)), (4, 1, (4, 1)), (4, None, (1, 4)), (4, 3, None), (6, 4, None)],
)
def test_grid_of_an_expert_parallel_group(ep: int, ranks_per_node: int | None, grid: tuple[int, int] | None):
    """[nodes, ranks of a node], every rank in it where it is on the line; none where a group begins inside a node."""
    for rank in range(12):
        with fake_mesh(MeshConfig(ep=ep, ranks_per_node=ranks_per_node), rank, 12) as mesh:
            nodes = mesh.ep.nodes
            if grid is None:
                assert nodes is None
                continue
            assert nodes is not None and (nodes.across.size, nodes.inside.size) == grid
            assert nodes.across.rank * grid[1] + nodes.inside.rank == mesh.ep.rank


def test_one_process_is_one_node():
    nodes = Mesh.alone().ep.nodes
    assert nodes is not None and (nodes.across.size, nodes.inside.size) == (1, 1)


def test_nodes_that_do_not_fit():
    with pytest.raises(ConfigError, match="is not a number of ranks"):
        MeshConfig(ranks_per_node=0)
    with pytest.raises(ConfigError, match="does not divide the 4 ranks launched. Set mesh.ranks_per_node to 1, 2 or 4"):
        MeshConfig(ranks_per_node=3).check_world(4)
