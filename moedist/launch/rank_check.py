"""Starts ranks that measure each other (`moedist.doctor.ranks`), and reads what they found."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedist.doctor.finding import Finding, problem
from moedist.doctor.links import Collective, Links, judge_links
from moedist.doctor.ranks import RESULT
from moedist.launch.start import Ranks, last_line, run_ranks
from moedist.mesh import MeshConfig
from moedist.train.config import LaunchConfig

PROGRAM = "moedist.doctor"


def check_ranks(
    ranks: Ranks, launch: LaunchConfig, mesh: MeshConfig, target: Sequence[str] = (PROGRAM,)
) -> tuple[list[Finding], dict[str, Any] | None]:
    """Starts the ranks as a run would, on all nodes that call this.

    Args:
        ranks, launch, mesh: of the run.
        target: module of a rank's program and its first arguments.

    Returns:
        what was found; and the measurements as plain mappings, None where ranks failed. Logs are kept only there.
    """
    folder = Path(tempfile.mkdtemp(prefix="moedist-doctor-"))
    (folder / "logs").mkdir()
    arguments = [str(folder), mesh.device, str(mesh.timeout_s)]
    status = run_ranks(ranks, launch, folder, [*target, *arguments], name=PROGRAM, terminal=sys.stderr)
    found: dict[str, Any] = {}
    if (folder / RESULT).is_file():
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if "missing" in found:
        where = f"See {folder / 'logs'}, and on the machine of the missing rank what it does."
        return [problem("ranks", found["message"], where)], None
    if not found or status.exit_code != 0:
        message = status.message if status.rank is None else f"{status.message} ({last_line(folder, status.rank)})"
        return [problem("ranks", message, f"{status.what_to_do} Logs: {folder / 'logs'}")], None
    shutil.rmtree(folder)
    return judge_links(read_links(found)), found


def read_links(found: dict[str, Any]) -> Links:
    """The measurements from their plain mappings."""
    collectives = {
        name: Collective(each["bytes"], each["seconds"], tuple(each["wrong"]))
        for name, each in found["collectives"].items()
    }
    return Links(
        device=found["device"],
        backend=found["backend"],
        hosts=tuple(found["hosts"]),
        came_s=tuple(found["came_s"]),
        compute_s=tuple(found["compute_s"]),
        collectives=collectives,
        pair_bytes=found["pair_bytes"],
        pair_s=tuple(tuple(line) for line in found["pair_s"]),
    )
