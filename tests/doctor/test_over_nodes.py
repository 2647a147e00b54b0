"""Nodes as network namespaces: whose link is slow, and that a node is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.namespaces import Nodes, environment, nodes, why_not

LIMIT_S = 600.0

pytestmark = pytest.mark.slow


def examine(network: Nodes, present: list[int], folder: Path, *more: str) -> list[tuple[int, dict[str, Any]]]:
    """What the command says on each node that is there: its exit code and its JSON."""
    command = [sys.executable, "-m", "moedist", "doctor", "ranks", "--json", "mesh.device=cpu", "--nproc", "1"]
    command += [f"launch.nnodes={network.count}", f"launch.rendezvous={network.address(0)}:29400", *more]
    started = [network.start(index, command, environment(folder / str(index)), folder) for index in present]
    said = [process.communicate(timeout=LIMIT_S) for process in started]
    return [(process.returncode, json.loads(out)) for process, (out, _) in zip(started, said, strict=True)]


def test_a_node_with_a_slow_link_is_named(tmp_path: Path):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with nodes(3) as three:
        three.slow_down("20mbit", only=2)
        for code, told in examine(three, [0, 1, 2], tmp_path, "mesh.ep=1"):
            (found,) = [finding for finding in told["findings"] if finding["check"] == "pairs between hosts"]
            assert code == 0 and set(told["measured"]["hosts"]) == {"n0", "n1", "n2"}
            slow = told["measured"]["hosts"].index("n2")
            assert found["level"] == "warning" and f"all of them at rank {slow} (n2)" in found["text"], found


def test_a_node_that_never_comes_is_bounded(tmp_path: Path):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with nodes(2) as two:
        ((code, told),) = examine(two, [0], tmp_path, "mesh.ep=1", "mesh.timeout_s=15")
    assert code == told["exit_code"] == 4 and told["measured"] is None
    (found,) = told["findings"]
    assert "2 nodes did not meet" in found["text"] and "n0" in found["text"], found
