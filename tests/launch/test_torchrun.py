"""Training on several nodes: network namespaces of this machine, started by the line that a user runs on each."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moedist.train.checkpoint.manifest import folder_name, verify
from tests.end_to_end.runs import TINY, of_no_clock
from tests.launch.namespaces import ROOT, Nodes, environment, nodes, why_not
from tests.rows import read_rows

pytestmark = pytest.mark.slow

SCRIPT = str(ROOT / "launch" / "torchrun.sh")
LIMIT_S = 300.0
"""Of a whole run: on busy cores most of it goes into importing torch on every node."""


@pytest.fixture(autouse=True, scope="module")
def namespaces() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    with nodes(request.param) as made:
        yield made


two_nodes = pytest.mark.parametrize("network", [2], indirect=True, ids=["2 nodes"])
three_nodes = pytest.mark.parametrize("network", [3], indirect=True, ids=["3 nodes"])


@dataclasses.dataclass
class End:
    """How one node's command ended."""

    exit_code: int
    out: str
    err: str
    after_s: float


@dataclasses.dataclass
class Cluster:
    """A run of one line on every node."""

    network: Nodes
    base: Path
    folder: Path
    processes: list[subprocess.Popen[str]]

    def reached(self) -> None:
        self.wait_for(lambda: (self.folder / "gate_reached").exists())

    def open_gate(self) -> None:
        (self.folder / "gate_open").touch()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            ended = [process for process in self.processes if process.poll() is not None]
            assert len(ended) < len(self.processes), [process.communicate() for process in ended]
            time.sleep(0.05)

    def parent_of(self, node: int) -> int:
        """The process on a node that a user's signal reaches: `moedist train`."""
        found = subprocess.run(
            ["pgrep", "-f", "-s", str(self.processes[node].pid), "moedist train"], capture_output=True
        )
        return int(found.stdout.split()[0])

    def beat(self, rank: int) -> dict[str, Any]:
        return json.loads((self.folder / "logs" / f"heartbeat_{rank}.json").read_text())

    def log_of(self, node: int) -> str:
        return (self.folder / "logs" / f"launcher_n{node}.log").read_text()

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    def ends(self, *which: int) -> list[End]:
        began, ends = time.monotonic(), []
        for node in which or range(len(self.processes)):
            out, err = self.processes[node].communicate(timeout=LIMIT_S)
            ends.append(End(self.processes[node].returncode, out, err, time.monotonic() - began))
        return ends


def start(
    network: Nodes, base: Path, *overrides: str, gate: int | None = None, nproc: int = 1, lines: dict | None = None
) -> Cluster:
    """The line on every node; ``lines``: what single nodes are given beside it."""
    variables = environment(base / "home")
    folder = base / "run"
    for mark in ("gate_reached", "gate_open"):
        (folder / mark).unlink(missing_ok=True)
    if gate is not None:
        variables["OUTSIDE_GATE"] = str(gate)
    world = network.count * nproc
    line = [SCRIPT, "--nnodes", str(network.count), "--host", network.address(0), f"run.dir={folder}", *TINY]
    line += [
        "log/sink=[console,jsonl,gate]",
        f"launch.nproc={nproc}",
        f"mesh.ep={world}",
        f"moe.num_experts={2 * world}",
    ]
    processes = [
        network.start(node, [*line, *overrides, *(lines or {}).get(node, [])], variables, base)
        for node in range(network.count)
    ]
    return Cluster(network, base, folder, processes)


@two_nodes
def test_two_nodes_train_stop_and_go_on(network: Nodes, tmp_path: Path):
    """SIGTERM to one node's command: every node saves, leaves with 75, and torchrun's restarts do not bring the run
    back; the same line goes on, and ends with the numbers of one machine."""
    restarts = "launch.max_restarts=2"
    first = start(network, tmp_path, restarts, "run.resume=auto", nproc=2, gate=10)
    first.reached()
    os.kill(first.parent_of(1), signal.SIGTERM)
    first.wait_for(lambda: "SIGTERM" in first.log_of(1))
    first.open_gate()
    ends = first.ends()
    assert [end.exit_code for end in ends] == [75, 75], ends
    step = first.status["step"]
    assert first.status["reason"] == "preempted" and step >= 10
    assert verify(first.folder / "checkpoints" / folder_name(step)).step == step
    assert network.processes() == []

    second = start(network, tmp_path, restarts, "run.resume=auto", nproc=2)
    ends = second.ends()
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()].count("run") == 1
    assert (second.folder / "config.yaml").is_file() and second.status["reason"] == "done"
    assert all("Traceback" not in end.err for end in ends)
    for node, end in enumerate(ends):  # few variables, all of them printed, on the terminal and in the log
        assert "sets   GLOO_SOCKET_IFNAME=veth0" in end.err and "TORCH_FR_BUFFER_SIZE=2000" in second.log_of(node)
    hosts = {second.beat(rank)["host"] for rank in range(4)}
    assert hosts == {"n0", "n1"}

    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "moedist", "train", *TINY, f"run.dir={alone}", "launch.nproc=4", "mesh.ep=4"]
    command += ["log/sink=[jsonl]", "moe.num_experts=8"]
    subprocess.run(command, env=environment(tmp_path / "home"), cwd=tmp_path, check=True, capture_output=True)
    assert of_no_clock(read_rows(second.folder)) == of_no_clock(read_rows(alone))


@three_nodes
def test_three_nodes_train(network: Nodes, tmp_path: Path):
    cluster = start(network, tmp_path)
    ends = cluster.ends()
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert cluster.status["reason"] == "done"
    assert {cluster.beat(rank)["host"] for rank in range(3)} == {"n0", "n1", "n2"}
    assert sum(bool(end.out.strip()) for end in ends) == 1, "rank 0 alone speaks to people"
    assert network.processes() == []


@three_nodes
def test_a_lost_node_is_named_in_bounded_time(network: Nodes, tmp_path: Path):
    timeout_s = 8
    cluster = start(network, tmp_path, f"mesh.timeout_s={timeout_s}", "mesh.save_timeout_s=20", gate=10)
    cluster.reached()
    (lost,) = [rank for rank in range(3) if cluster.beat(rank)["host"] == "n2"]
    pid = cluster.beat(lost)["pid"]
    network.kill(2)
    cluster.open_gate()
    ends = cluster.ends(0, 1)
    assert [end.exit_code for end in ends] == [5, 5], ends
    # The time-out, silence, torch's minute for a store whose node is gone, and slack for busy cores.
    assert max(end.after_s for end in ends) < timeout_s + 12 + 60 + 40
    status = cluster.status
    assert status["reason"] == "peer_lost" and f"rank {lost} (n2, process {pid})" in status["message"]
    assert status["last_good_checkpoint"].endswith(folder_name(6))
    assert "torchfrtrace" in status["what_to_do"]
    reading = status["what_to_do"].split("`")[1].split()
    read = subprocess.run([str(Path(sys.executable).parent / reading[0]), *reading[1:]], capture_output=True, text=True)
    assert read.returncode == 0 and f"({{{lost}}})" in read.stdout + read.stderr, read
    assert network.processes() == []


@two_nodes
def test_the_node_that_holds_the_rendezvous_is_lost(network: Nodes, tmp_path: Path):
    """The run ends, in bounded time, also where restarts are allowed: nobody is left to meet at."""
    timeout_s = 8
    limits = (f"mesh.timeout_s={timeout_s}", "mesh.save_timeout_s=20", "launch.max_restarts=1")
    cluster = start(network, tmp_path, *limits, gate=10)
    cluster.reached()
    (lost,) = [rank for rank in range(2) if cluster.beat(rank)["host"] == "n0"]
    network.kill(0)
    cluster.open_gate()
    (end,) = cluster.ends(1)
    assert end.exit_code in (4, 5) and "run.resume=auto" in end.err, end
    # The time-out, silence, the launcher's patience, and slack for busy cores.
    assert end.after_s < timeout_s + 12 + 30 + 60
    assert f"rank {lost} (n0" in (cluster.folder / "logs" / "rank_1.log").read_text() + end.err
    assert network.processes() == []


@two_nodes
def test_a_rank_that_is_killed_on_one_node_is_started_again(network: Nodes, tmp_path: Path):
    cluster = start(network, tmp_path, "launch.max_restarts=1", gate=10)
    cluster.reached()
    (there,) = [rank for rank in range(2) if cluster.beat(rank)["host"] == "n1"]
    os.kill(cluster.beat(there)["pid"], signal.SIGKILL)
    cluster.open_gate()
    ends = cluster.ends()
    assert [end.exit_code for end in ends] == [0, 0], ends
    rows = read_rows(cluster.folder)
    assert max(of_no_clock(rows)) == 40 and any(row.get("replayed") for row in rows)


@two_nodes
def test_nodes_that_disagree_are_refused(network: Nodes, tmp_path: Path):
    cluster = start(network, tmp_path, lines={1: ["seed=4"]})
    ends = cluster.ends()
    assert [end.exit_code for end in ends] == [2, 2], ends
    for end in ends:
        assert "ranks = [1] were given other arguments than rank 0" in end.err
    assert not (cluster.folder / "config.yaml").exists()


@two_nodes
def test_a_node_that_never_comes(network: Nodes, tmp_path: Path):
    """Both ways round: the others wait at a rendezvous, or for one that nobody opens."""
    cluster = start(network, tmp_path, "launch.meet_within_s=5", lines={1: ["mesh.epp=1"]})
    ends = cluster.ends()
    assert [end.exit_code for end in ends] == [4, 2], ends
    assert "2 nodes did not meet at launch.rendezvous" in ends[0].err and "started this run: n0." in ends[0].err
    cluster = start(network, tmp_path / "again", "launch.meet_within_s=5", lines={0: ["mesh.epp=1"]})
    ends = cluster.ends()
    assert [end.exit_code for end in ends] == [2, 4], ends
    assert "launch.rendezvous" in ends[1].err and "is not open" in ends[1].err
