"""Heartbeats say who waits where; a stuck rank is ended. Time is told, never waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moedist.train import watchdog
from moedist.train.watchdog import SILENT_S, Watchdog, heartbeat_path, silent_ranks, who_is_missing

EPOCH = 1_700_000_000.0


class Time:
    """Both clocks of a rank; they show what they are told."""

    def __init__(self) -> None:
        self.passed = 0.0

    def clock(self) -> float:
        return 50.0 + self.passed

    def wall(self) -> float:
        return EPOCH + self.passed


class Rank(Watchdog):
    """A watchdog that remembers why it would have ended its process."""

    def __init__(self, folder: Path, rank: int, time: Time):
        self.ended: list[str] = []
        super().__init__(folder, rank, 120.0, clock=time.clock, wall=time.wall, end=self.ended.append)


def test_a_heartbeat_says_what_since_when_and_where(tmp_path: Path) -> None:
    time = Time()
    rank = Rank(tmp_path, 3, time)
    time.passed = 10
    rank.enter("forward", 7)
    assert not list(tmp_path.iterdir()), "entering a phase wrote"
    time.passed = 15
    rank.write()
    beat = json.loads(heartbeat_path(tmp_path, 3).read_text())
    assert (beat["rank"], beat["step"], beat["phase"], beat["pid"]) == (3, 7, "forward", os.getpid())
    assert (beat["since"], beat["written"]) == (EPOCH + 10, EPOCH + 15)
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat_3.json"]


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    Rank(tmp_path / "none", 0, Time()).write()


def test_a_phase_over_its_limit_ends_the_rank(tmp_path: Path) -> None:
    time = Time()
    rank = Rank(tmp_path, 1, time)
    time.passed = 10_000
    rank.check()
    rank.enter("forward", 7)
    time.passed += 120
    rank.check()
    rank.enter("save", 7, limit_s=900)
    time.passed += 900
    rank.check()
    assert not rank.ended, "start has no limit, and a limit may be reached"
    time.passed += 1
    rank.check()
    (reason,) = rank.ended
    assert reason.startswith("rank 1 (") and f"process {os.getpid()}) in save of step 7 for 901 s" in reason
    assert "longer than the 900 s it may take" in reason
    rank.enter("forward", 8)
    time.passed += 120.5
    rank.check()
    assert len(rank.ended) == 2, "a phase has the usual limit again"


def test_the_threads_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "INTERVAL_S", 0.001)
    ended = threading.Event()
    with Watchdog(tmp_path, 0, 120.0, end=lambda reason: ended.set()) as rank:
        rank.enter("forward", 1, limit_s=-1.0)
        assert ended.wait(30)


def test_a_stuck_process_is_killed_and_says_where_it_was(tmp_path: Path) -> None:
    stuck = (
        "import threading, sys\n"
        "from pathlib import Path\n"
        "from moedist.train.watchdog import Watchdog\n"
        "def hang(): threading.Event().wait()\n"
        "with Watchdog(Path(sys.argv[1]), 2, limit_s=-1.0) as watchdog:\n"
        "    watchdog.enter('backward', 9)\n"
        "    hang()\n"
    )
    done = subprocess.run([sys.executable, "-c", stuck, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "in backward of step 9 for " in done.stderr and " in hang\n" in done.stderr


def beats(folder: Path, *places: tuple[int, str, float]) -> Time:
    """One rank per (step, phase, seconds when it began)."""
    time = Time()
    ranks = [Rank(folder, number, time) for number in range(len(places))]
    for rank, (step, phase, began) in zip(ranks, places, strict=True):
        time.passed = began
        rank.enter(phase, step)
    time.passed = 100
    for rank in ranks:
        rank.write()
    return time


def missing(folder: Path, world_size: int, time: Time) -> str:
    return who_is_missing(folder, world_size, time.wall)


def test_the_rank_in_the_lowest_step_is_missing(tmp_path: Path) -> None:
    time = beats(tmp_path, (18, "forward", 60), (18, "forward", 61), (17, "data", 57), (18, "loss", 70))
    text = missing(tmp_path, 4, time)
    assert text.startswith("rank 2 (") and text.count("rank") == 1
    assert text.endswith("in data of step 17 for 43 s, while others are in loss of step 18")


def test_in_one_step_the_oldest_phase_is_missing(tmp_path: Path) -> None:
    time = beats(tmp_path, (18, "forward", 60), (18, "data", 50), (18, "data", 51))
    text = missing(tmp_path, 3, time)
    assert "rank 1 (" in text and "rank 2 (" in text and "rank 0" not in text
    assert "in data of step 18 for 50 s, while others are in forward of step 18" in text


def test_silent_and_absent_ranks_are_missing(tmp_path: Path) -> None:
    time = beats(tmp_path, (18, "forward", 60), (18, "forward", 60), (18, "forward", 60))
    time.passed += SILENT_S + 1
    for number in (0, 2):
        rank = Rank(tmp_path, number, time)
        rank.enter("forward", 18)
        rank.write()
    heartbeat_path(tmp_path, 2).write_text("{")
    text = missing(tmp_path, 4, time)
    assert text.startswith("rank 2 has left no heartbeat; rank 3 has left no heartbeat; rank 1 (")
    assert text.endswith("in forward of step 18 has been silent for 11 s")
    assert silent_ranks(tmp_path, 4, time.wall) == [1]


def test_where_all_do_the_same_nobody_is_missing(tmp_path: Path) -> None:
    time = beats(tmp_path, (18, "forward", 60), (18, "forward", 20))
    assert missing(tmp_path, 2, time) == "no rank is behind: all 2 are in forward of step 18"
