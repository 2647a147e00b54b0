"""Collectives over an axis, and on one process."""

from __future__ import annotations

import pytest
import torch

from moedist.mesh import Axis, Mesh
from moedist.mesh.collectives import all_gather, all_max, all_sum, all_to_all, barrier, broadcast_json
from tests.ranks import Here

VALUE = {"text": 'ä\n"', "list": [1, 2.5, None, True], "deep": {"x": {}}}


def test_one_process():
    axis, x = Axis("dp"), torch.arange(6.0).view(3, 2)
    assert all_sum(x, axis) is x and all_max(x, axis) is x
    assert torch.equal(all_to_all(x, axis), x) and torch.equal(all_to_all(x, axis, [3], [3]), x)
    gathered = all_gather(x, axis)
    assert gathered.shape == (1, 3, 2)
    gathered.zero_()
    assert x.sum() == 15, "a copy"
    assert broadcast_json(VALUE, axis, torch.device("cpu")) is VALUE
    barrier(axis, torch.device("cpu"))
    with pytest.raises(AssertionError, match="axis dp has no process group"):
        _ = axis.group


def test_a_mesh_of_one_process():
    mesh = Mesh.alone()
    assert mesh.device == torch.device("cpu") and mesh.device_mesh is None
    for name in ("dp", "ep", "edp"):
        axis = getattr(mesh, name)
        assert (axis.name, axis.size, axis.rank, axis.group_name) == (name, 1, 0, None)


def collected(here: Here) -> dict[str, list]:
    mesh = here.mesh_of(2)
    mine = torch.tensor([here.rank, 10 - here.rank])
    rows = torch.tensor([[100 * here.rank + i] for i in range(3)])
    # rank r of ep sends r + 1 rows to rank 0 and 2 - r to rank 1
    sizes = [[1, 2], [2, 1]]
    send, receive = sizes[mesh.ep.rank], [row[mesh.ep.rank] for row in sizes]
    barrier(mesh.dp, mesh.device)
    return {
        "sum": all_sum(mine.clone(), mesh.dp).tolist(),
        "sum edp": all_sum(mine.clone(), mesh.edp).tolist(),
        "max": all_max(mine.clone(), mesh.dp).tolist(),
        "gather": all_gather(mine, mesh.ep).tolist(),
        "exchange": all_to_all(rows, mesh.ep, send, receive).flatten().tolist(),
        "equal": all_to_all(rows[:2], mesh.ep).flatten().tolist(),
        "none": list(all_to_all(rows[:0], mesh.ep, [0, 0], [0, 0]).shape),
        "json": broadcast_json(VALUE if here.rank == 0 else None, mesh.dp, mesh.device),
        "place": [mesh.dp.rank, mesh.ep.rank, mesh.edp.rank, mesh.dp.size, mesh.ep.size, mesh.edp.size],
    }


def test_four_ranks(ranks):
    results = ranks(4).run(collected)
    for rank, result in enumerate(results):
        edp, ep = divmod(rank, 2)
        peers = [2 * edp, 2 * edp + 1]
        assert result["place"] == [rank, ep, edp, 4, 2, 2]
        assert result["sum"] == [6, 34] and result["max"] == [3, 10]
        assert result["sum edp"] == [2 * ep + 2, 18 - 2 * ep]
        assert result["gather"] == [[peer, 10 - peer] for peer in peers]
        first, second = (100 * peer for peer in peers)
        expected = [[first, second, second + 1], [first + 1, first + 2, second + 2]]
        assert result["exchange"] == expected[ep]
        assert result["equal"] == [first + ep, second + ep]
        assert result["none"] == [0, 1]
        assert result["json"] == VALUE
