"""How a run stands, from its status file, its lock and the age of its last row."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Literal

from moedist.log.run_files import METRICS
from moedist.train.lock import holder_of, is_held
from moedist.train.status import read_status

State = Literal["running", "done", "stopped", "failed", "stale"]

HEARTBEAT_S = 600.0
"""A run that another machine holds counts as running while its last row is younger."""


def state_of(folder: Path, now: float | None = None) -> State:
    """One word.

    ``running``: a process holds the folder, or another machine's does as far as the last row's age tells. ``done``,
    ``stopped`` (preempted and saved) and ``failed`` are what its status says. ``stale``: nobody holds it and it left no
    status, as after a kill.

    Args:
        folder: of the run.
        now: seconds since the epoch; None for the clock's.
    """
    if is_held(folder):
        return "running"
    status = read_status(folder)
    if status is not None:
        return "done" if status.reason == "done" else "stopped" if status.reason == "preempted" else "failed"
    host = holder_of(folder).get("host")
    if host not in (None, socket.gethostname()) and _age(folder, now) < HEARTBEAT_S:
        return "running"
    return "stale"


def _age(folder: Path, now: float | None) -> float:
    """Seconds since the last row; infinite without one."""
    try:
        return (time.time() if now is None else now) - (folder / METRICS).stat().st_mtime
    except OSError:
        return float("inf")
