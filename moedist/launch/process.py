"""Processes that must not outlive their starter, found and ended wherever they went (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

LAUNCH_ID = "MOEDIST_LAUNCH_ID"
"""Environment variable that all processes of one launch share; it finds them when their parents are gone."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to send this process SIGTERM when its parent ends, however it ends.

    Args:
        parent: the parent's process id; where it has gone already, the signal comes at once.
    """
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def launch_processes(launch_id: str) -> list[int]:
    """Process ids of a launch that are alive, this process left out."""
    wanted, found = f"{LAUNCH_ID}={launch_id}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if int(entry.name) != os.getpid() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill_launch(launch_id: str, patience_s: float = 5.0) -> None:
    """Ends every process of a launch with SIGKILL; returns when they are gone, or after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while (pids := launch_processes(launch_id)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
