"""The environment variables that the launcher sets for ranks: few, all of them written down, and the user's own win."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moedist.launch.nodes import Node
from moedist.train.flight_recorder import dump_prefix

RECORDED_COLLECTIVES = 2000
"""How many of its latest collectives a rank remembers for the case that one never ends."""


def rank_environment(threads: int, run_dir: Path, node: Node | None) -> dict[str, str]:
    """What ranks need and torch does not do of itself.

    Args:
        threads: of each rank.
        run_dir: the run folder.
        node: this node among several; None for a run on one.
    """
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        # Ranks that are started again after a kill would read a stale address from a shared store.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_FR_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
        "TORCH_FR_DUMP_TEMP_FILE": str(dump_prefix(run_dir)),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    if node is not None and node.interface is not None:
        wanted["GLOO_SOCKET_IFNAME"] = node.interface  # gloo would ask the host's name, often the loopback address
    return wanted


def without_users(wanted: Mapping[str, str], users: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What to set, and a line for people. A variable that the user has set stays; the threads are of the configuration.

    Args:
        wanted: `rank_environment`.
        users: variables as they are.
    """
    kept = {name for name in wanted if name in users and name != "OMP_NUM_THREADS"}
    chosen = {name: value for name, value in wanted.items() if name not in kept}
    lines = ["sets   " + " ".join(f"{name}={value}" for name, value in sorted(chosen.items()))]
    if kept:
        lines.append("keeps  " + " ".join(f"{name}={users[name]}" for name in sorted(kept)))
    return chosen, lines
