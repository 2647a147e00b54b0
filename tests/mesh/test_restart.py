"""Ranks agree on whether they were started again, whatever each node's launcher has counted."""

from __future__ import annotations

import os

import torch

from moedist.mesh.restart import restarted
from tests.ranks import Here


def counted(here: Here, counts: list[list[int]]) -> list[bool]:
    mesh, said = here.mesh_of(ep=1), []
    for of_ranks in counts:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(of_ranks[here.rank])
        said.append(restarted(mesh.dp, torch.device("cpu")))
    del os.environ["TORCHELASTIC_RESTART_COUNT"]
    return said


def test_one_count_is_enough(ranks):
    assert ranks(2).run(counted, [[0, 0], [0, 1], [2, 0]]) == [[False, True, True]] * 2
