"""Starts ranks that measure each other (`moedist.doctor.ranks`), and reads what they found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode
from moedist.doctor.finding import Finding, problem
from moedist.doctor.links import Collective, Links, judge_links
from moedist.doctor.ranks import RESULT
from moedist.launch.outcome import last_line
from moedist.launch.start import Ranks, run_ranks
from moedist.mesh import MeshConfig
from moedist.train.config import LaunchConfig

PROGRAM = "moedist.doctor"


@dataclasses.dataclass(frozen=True)
class RankCheck:
    """How it came out.

    Attributes:
        findings: of the ranks.
        measured: the measurements as plain mappings (`Links`); None where ranks failed.
        exit_code: of the ranks; whether a finding is a problem is not in it.
    """

    findings: list[Finding]
    measured: dict[str, Any] | None = None
    exit_code: int = ExitCode.DONE


def check_ranks(ranks: Ranks, launch: LaunchConfig, mesh: MeshConfig, target: Sequence[str] = (PROGRAM,)) -> RankCheck:
    """Starts the ranks as a run would, on all nodes that call this; nodes and ranks wait for each other for
    ``mesh.timeout_s``. Logs are kept only where ranks fail.

    Args:
        ranks, launch, mesh: of the run.
        target: module of a rank's program and its first arguments.
    """
    launch = dataclasses.replace(launch, meet_within_s=mesh.timeout_s, max_restarts=0)
    folder = Path(tempfile.mkdtemp(prefix="moedist-doctor-"))
    (folder / "logs").mkdir()
    arguments = [str(folder), mesh.device, str(mesh.timeout_s)]
    try:
        status = run_ranks(ranks, launch, folder, [*target, *arguments], name=PROGRAM, terminal=sys.stderr)
    except ConfigError as error:  # this node does not find its way to the others
        text = f"{error.key} = {error.value!r} {error.problem}"
        return RankCheck([problem("ranks", text, error.remedy)], exit_code=error.exit_code)
    found: dict[str, Any] = {}
    if (folder / RESULT).is_file():
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if "missing" in found:
        where = f"See {folder / 'logs'}, and on the machine of the missing rank what it does."
        return RankCheck([problem("ranks", found["message"], where)], exit_code=ExitCode.RANK_FAILED)
    if not found or status.exit_code != 0:
        message = status.message if status.rank is None else f"{status.message} ({last_line(folder, status.rank)})"
        remedy = f"{status.what_to_do} Logs: {folder / 'logs'}"
        return RankCheck([problem("ranks", message, remedy)], exit_code=status.exit_code or ExitCode.RANK_FAILED)
    shutil.rmtree(folder)
    return RankCheck(judge_links(read_links(found)), found)


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
