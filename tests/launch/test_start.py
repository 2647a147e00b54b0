"""Real torchrun, real processes, ranks without torch."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moedist.launch.nodes import Node
from moedist.launch.process import LAUNCH_ID
from moedist.launch.start import Launch, Ranks, plan_ranks, run_ranks, torchrun_command
from moedist.train.config import LaunchConfig
from moedist.train.status import read_status, write_status
from tests.launch.test_outcome import make_checkpoint

ROOT = Path(__file__).parents[2]
RANKS = Ranks(nproc=2, nnodes=1, threads=3)

PARENT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from moedist.launch.start import Ranks, run_ranks
launch = SimpleNamespace(stop_after_s=float(sys.argv[3]), max_restarts=0, nnodes=1)
status = run_ranks(Ranks(2, 1, 1), launch, Path(sys.argv[2]), ["tests.launch.rank_stub", sys.argv[1], sys.argv[2]])
assert "torch" not in sys.modules, "the launching process needs no torch"
sys.exit(status.exit_code)
"""


def run_stub(action: str, folder: Path, **options: object):
    return run_ranks(RANKS, LaunchConfig(), folder, ["tests.launch.rank_stub", action, str(folder)], **options)


def wait_for(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(folder: Path) -> list[int]:
    """Processes of the stub's launch that run: they have the run folder on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


@dataclasses.dataclass
class Parent:
    """A launching parent and its run folder."""

    process: subprocess.Popen[bytes]
    folder: Path

    def ready(self) -> None:
        wait_for(lambda: all((self.folder / f"ready_{rank}").exists() for rank in range(2)))


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Parent]]:
    """One parent per case, all started at once, because each takes seconds to start."""
    cases = {"saved": ("save", 25.0), "interrupted": ("stay", 25.0), "late": ("stay", 0.3), "orphaned": ("save", 25.0)}
    started = {}
    for name, (action, stop_after_s) in cases.items():
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-c", PARENT, action, str(folder), str(stop_after_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started[name] = Parent(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True), folder)
    yield started
    for parent in started.values():
        parent.process.kill()
        parent.process.wait()
        wait_for(lambda folder=parent.folder: not alive(folder))


def test_ranks_that_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    status = run_stub("end", tmp_path)
    assert (status.reason, status.exit_code) == ("done", 0)
    assert read_status(tmp_path) == status
    for rank in range(2):
        said = (tmp_path / "logs" / f"rank_{rank}.log").read_text()
        assert f"RANK={rank} WORLD_SIZE=2 OMP_NUM_THREADS=3 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said
        assert "MASTER_ADDR=127.0.0.1" in said
    assert capfd.readouterr().out.strip() == "rank 0 speaks to the terminal"


def test_the_status_of_an_earlier_start_is_not_taken_for_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_status(tmp_path, "nonfinite", "Long ago.")
    monkeypatch.setattr("moedist.launch.start.torchrun_command", lambda *args: ["false"])
    status = run_stub("end", tmp_path)
    assert (status.reason, status.message) == ("bug", "The launcher failed: torchrun ended without a word")
    assert "launcher.log" in status.what_to_do


def test_a_rank_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    checkpoint = make_checkpoint(tmp_path, 40)
    status = run_stub("die", tmp_path)
    assert (status.reason, status.exit_code, status.rank) == ("peer_lost", 5, 1)
    assert "Rank 1 was ended by SIGKILL" in status.message
    assert "run.resume=auto" in status.what_to_do
    assert status.last_good_checkpoint == str(checkpoint)
    assert not alive(tmp_path)


def test_a_signal_saves_and_leaves(parents: dict[str, Parent]):
    parent = parents["saved"]
    parent.ready()
    parent.process.send_signal(signal.SIGUSR1)
    assert parent.process.wait(60) == 75
    status = read_status(parent.folder)
    assert status is not None and (status.reason, status.step) == ("preempted", 3)
    assert not alive(parent.folder)


def test_a_second_interrupt_kills(parents: dict[str, Parent]):
    parent = parents["interrupted"]
    parent.ready()
    parent.process.send_signal(signal.SIGINT)
    wait_for(lambda: b"SIGTERM" in (parent.folder / "logs" / "launcher.log").read_bytes())
    parent.process.send_signal(signal.SIGINT)
    assert parent.process.wait(60) == 5
    status = read_status(parent.folder)
    assert status is not None and "second interrupt" in status.message
    assert not alive(parent.folder)


def test_ranks_that_do_not_leave_are_killed(parents: dict[str, Parent]):
    parent = parents["late"]
    parent.ready()
    parent.process.send_signal(signal.SIGTERM)
    assert parent.process.wait(60) == 5
    status = read_status(parent.folder)
    assert status is not None and "launch.stop_after_s = 0.3 s" in status.message
    assert not alive(parent.folder)


def test_no_orphans_when_the_parent_is_killed(parents: dict[str, Parent]):
    parent = parents["orphaned"]
    parent.ready()
    assert len(alive(parent.folder)) == 4  # parent, torchrun, two ranks
    parent.process.kill()
    parent.process.wait()
    wait_for(lambda: not alive(parent.folder))
    status = read_status(parent.folder)
    assert status is not None and status.reason == "preempted", "the ranks were not asked to save"


def test_a_node_follows_when_another_one_was_asked_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchrun would start ranks again that have saved and left; the parent of every node stops it."""
    monkeypatch.setattr("moedist.launch.start.torchrun_command", lambda *args: ["sleep", "1000"])
    monkeypatch.setattr("moedist.launch.start.LOOK_S", 0.0)
    write_status(tmp_path, "preempted", "At an earlier start.", step=1)
    with Launch(RANKS, LaunchConfig(), tmp_path, ["m"], node=Node("127.0.0.1", "lo", True)) as launch:
        assert launch.poll() is None and launch.poll() is None
        write_status(tmp_path, "preempted", "Asked to stop after step 3; saved.", step=3)
        wait_for(lambda: (status := launch.poll()) is not None and status.exit_code == 75)


def test_a_node_leaves_a_rendezvous_that_nobody_answers_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchrun would wait for its silent store without end."""
    monkeypatch.setattr("moedist.launch.start.torchrun_command", lambda *args: ["sleep", "1000"])
    for limit in ("LOOK_S", "LOST_S"):
        monkeypatch.setattr(f"moedist.launch.start.{limit}", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = LaunchConfig(nnodes=2, rendezvous=f"127.0.0.1:{server.getsockname()[1]}")
    ended = []
    with Launch(RANKS, gone, tmp_path, ["m"], node=Node("127.0.0.1", "lo", False)) as launch:
        wait_for(lambda: ended.append(launch.poll()) or ended[-1])
    assert (ended[-1].reason, ended[-1].exit_code) == ("io", 4)
    assert "or the node that holds it is gone" in ended[-1].message
    assert not alive(tmp_path)


def test_torchrun_command():
    one = torchrun_command(RANKS, LaunchConfig(max_restarts=2), "/run", ["m", "x=1"])
    assert one[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nnodes=1", "--nproc-per-node=2", "--max-restarts=2", "--rdzv-endpoint=127.0.0.1:0"} <= set(one)
    assert one[-3:] == ["-m", "m", "x=1"]
    many = LaunchConfig(nnodes=3, rendezvous="node:29400")
    places = [Node("10.0.0.1", "eth0", True), Node("10.0.0.2", "eth0", False)]
    commands = [torchrun_command(Ranks(8, 3, 1), many, "/run", ["m"], place) for place in places]
    first, second = map(set, commands)
    assert {"--rdzv-endpoint=node:29400", "--nnodes=3"} <= first & second, "nodes of one run must agree"
    assert first - second == {"--local-addr=10.0.0.1", "--rdzv-conf=is_host=1,join_timeout=600"}
    assert second - first == {"--local-addr=10.0.0.2", "--rdzv-conf=is_host=0,join_timeout=600"}
    assert torchrun_command(Ranks(8, 3, 1), many, "/other", ["m"], places[0]) != commands[0]


def test_plan_ranks():
    cores = len(os.sched_getaffinity(0))
    assert plan_ranks(LaunchConfig(nproc=1), "cpu") == Ranks(1, 1, cores)
    assert plan_ranks(LaunchConfig(nproc=10 * cores), "cpu").threads == 1
    assert plan_ranks(LaunchConfig(), "cpu").nproc == min(4, cores)
    assert LAUNCH_ID not in os.environ
