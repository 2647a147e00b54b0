"""Once per node where the link between nodes is slow: two network namespaces of two ranks, bytes and times."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

import pytest

from moedist.moe.dispatch.traffic import Batch, there_and_back
from tests.launch.namespaces import ROOT, Nodes, nodes, why_not
from tests.moe.over_nodes import DIM, NUM_EXPERTS, TOKENS

ROUNDS, RATE = 5, "50mbit"


def run_ranks(nodes: Nodes, choices: list[int], folder: Path) -> dict[str, dict[str, dict]]:
    """What rank 0 of two ranks on each node prints."""
    command = [sys.executable, "-m", "tests.moe.over_nodes", str(ROUNDS), *map(str, choices)]
    world = {"MASTER_ADDR": nodes.address(0), "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": "veth0"}
    world |= {"WORLD_SIZE": str(2 * nodes.count), "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    world |= {"PYTHONPATH": str(ROOT)}
    ranks = [
        nodes.start(rank // 2, command, {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank % 2)}, folder)
        for rank in range(2 * nodes.count)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(error for _, error in said)
    return json.loads(said[0][0])


@pytest.mark.slow
def test_once_per_node_is_faster_over_a_slow_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """E = 16 over two nodes of two ranks, 50 Mbit/s between them, the two dispatchers in turns."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with nodes(2) as two:
        two.slow_down(RATE)
        results = run_ranks(two, [1, 2, 4, 8], tmp_path)
    for text, found in results.items():
        top_k = int(text)
        sizes = Batch(TOKENS, DIM, NUM_EXPERTS, top_k, capacity=None, ep=4, nodes=2, element_bytes=4)
        flat, once = found["all_to_all"], found["hierarchical"]
        ratio = statistics.median(once["seconds"]) / statistics.median(flat["seconds"])
        with capsys.disabled():
            print(
                f"\nK = {top_k}: {once['bytes'] / 1e6:.2f} of {flat['bytes'] / 1e6:.2f} MB cross, "
                f"{1e3 * statistics.median(once['seconds']):.0f} of {1e3 * statistics.median(flat['seconds']):.0f} ms "
                f"({ratio:.2f})",
                end="",
            )
        # Each rank tells the other node of the pairs of its 8 experts; or of those, its rows and its two ranks'.
        assert flat["bytes"] == there_and_back(flat["rows"], sizes, gates=1) + 4 * 8 * 8
        assert once["bytes"] == there_and_back(once["rows"], sizes, gates=top_k, ids=top_k) + 4 * 8 * (1 + 2 + 8)
        assert once["rows"] <= 4 * TOKENS, "at most one copy of a token for the other node"
        if top_k >= 4:
            assert ratio < 1, found
