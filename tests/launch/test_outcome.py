"""How a launch ended, told from what it left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from moedist.launch.outcome import Failure, conclude, first_failure
from moedist.train.config import LaunchConfig
from moedist.train.status import read_status, write_status


def make_checkpoint(folder: Path, step: int) -> Path:
    from moedist.train.checkpoint.manifest import FileSeal, Manifest, folder_name, write_manifest

    path = folder / "checkpoints" / folder_name(step)
    path.mkdir(parents=True)
    (path / "shard").write_bytes(b"weights")
    write_manifest(path, Manifest(step, 2, {"shard": FileSeal.of(path / "shard")}, {}))
    return path


REPORT = """
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_14:00:00
  host      : node
  rank      : 12 (local_rank: 4)
  exitcode  : {code} (pid: 99)
  error_file: <N/A>
"""


def test_first_failure_is_the_root_cause():
    others = "Failures:\n[1]:\n  rank      : 3 (local_rank: 3)\n  exitcode  : 1 (pid: 7)\n"
    assert first_failure(others + REPORT.format(code=-9)) == Failure(12, -9)
    assert Failure(12, -9).signal_name == "SIGKILL"
    assert first_failure("nothing of the kind") is None


@pytest.mark.parametrize(
    ("said", "reason", "exit_code", "words"),
    [
        ("OSError: [Errno 98] Address already in use", "io", 4, "launch.rendezvous = 'node:29400' is taken"),
        ("torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError: gone", "io", 4, "did not meet"),
        ("ModuleNotFoundError: No module named 'torch.distributed'", "bug", 5, "No module named"),
    ],
)
def test_launchers_that_fail(tmp_path: Path, said: str, reason: str, exit_code: int, words: str):
    launch = LaunchConfig(nnodes=2, rendezvous="node:29400")
    status = conclude(tmp_path, 1, said, "none", launch, read_status(tmp_path))
    assert (status.reason, status.exit_code) == (reason, exit_code)
    assert words in status.message
    assert status.what_to_do


def test_what_ranks_said_is_kept_except_who_was_killed(tmp_path: Path):
    write_status(tmp_path, "nonfinite", "A NaN in layer 3.", rank=2, step=7)
    assert (
        conclude(tmp_path, 1, REPORT.format(code=5), "none", LaunchConfig(), read_status(tmp_path)).message
        == "A NaN in layer 3."
    )
    write_status(tmp_path, "peer_lost", "Rank 0 lost a peer.", rank=0, step=7)
    status = conclude(tmp_path, 1, REPORT.format(code=-9), "none", LaunchConfig(), read_status(tmp_path))
    assert (status.reason, status.rank, status.step) == ("peer_lost", 12, 7)
    write_status(tmp_path, "done", "All steps done.")
    status = conclude(tmp_path, 1, REPORT.format(code=1), "none", LaunchConfig(), read_status(tmp_path))
    assert (status.reason, status.exit_code) == ("bug", 5)
    assert "after the run was done" in status.message


def test_what_rank_0_refuses_keeps_its_code_and_writes_nothing(tmp_path: Path):
    said = "moedist train: run.dir = 'x' holds a run already. Name another run.dir.\n" + REPORT.format(code=2)
    status = conclude(tmp_path, 1, said, "none", LaunchConfig(), None)
    assert (status.reason, status.exit_code) == ("config", 2)
    assert status.message == "run.dir = 'x' holds a run already. Name another run.dir."
    assert list(tmp_path.iterdir()) == []


def test_stopped_before_the_first_step(tmp_path: Path):
    status = conclude(tmp_path, 1, REPORT.format(code=-15), "asked", LaunchConfig(), None)
    assert (status.reason, status.exit_code) == ("preempted", 75)


def test_a_rank_that_raises(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_12.log").write_text("Traceback ...\nRuntimeError: it breaks\n\n")
    status = conclude(tmp_path, 1, REPORT.format(code=1), "none", LaunchConfig(), read_status(tmp_path))
    assert (status.reason, status.exit_code, status.rank) == ("bug", 5, 12)
    assert status.message == "Rank 12 failed (exit code 1): RuntimeError: it breaks"
    assert "rank_12.log" in status.what_to_do
