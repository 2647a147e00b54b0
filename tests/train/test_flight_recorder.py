"""Ranks that fail leave what they asked of each other last, in a form that torch's own reader compares."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import torch

from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum
from moedist.train import flight_recorder
from moedist.train.ending import Ending
from tests.ranks import Here


def leave(here: Here, folder: str) -> None:
    mesh = here.mesh_of(ep=1)
    flight_recorder.forget(Path(folder), here.rank, mesh.dp.size)
    all_sum(torch.zeros(7), mesh.dp)
    flight_recorder.dump(Path(folder), here.rank)


def test_dumps_of_all_ranks_can_be_compared(ranks, tmp_path: Path):
    ranks(2).run(leave, str(tmp_path))
    folder = flight_recorder.dump_prefix(tmp_path).parent
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0", "rank_1"]
    command = shlex.split(flight_recorder.how_to_read(tmp_path).split("`")[1])
    assert command[-1] == str(folder)
    reader = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", *command[1:]]
    ended = subprocess.run(reader, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    flight_recorder.forget(tmp_path, 0, num_ranks=2)
    assert [path.name for path in folder.iterdir()] == ["rank_1"]
    flight_recorder.forget(tmp_path, 0, num_ranks=1)
    assert list(folder.iterdir()) == [], "of a rank that there is no more"


def test_a_lost_peer_is_told_with_the_way_to_read_it(tmp_path: Path):
    with Ending(tmp_path, Mesh.alone()) as end:
        raise RuntimeError("Timed out waiting 8000ms for recv operation to complete")
    assert end.exit_code == 5
    said = (tmp_path / "status.json").read_text()
    assert "peer_lost" in said and "torchfrtrace --allow-incomplete-ranks --prefix rank_" in said


def test_without_a_process_group_there_is_nothing_to_leave(tmp_path: Path):
    assert flight_recorder.dump(tmp_path, 0) is None and flight_recorder.how_to_read(tmp_path) == ""
