"""Who holds a run folder: the kernel's lock on ``<run>/run.lock``, which names its holder for people."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

LOCK = "run.lock"


def is_held(folder: Path) -> bool:
    """Whether a process that this machine's kernel knows holds a run folder; asking takes nothing from it."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def holder_of(folder: Path) -> dict[str, str]:
    """What the lock file says of the last holder: ``host``, ``pid`` and ``since``; empty where it says nothing."""
    try:
        fields = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return {name: str(fields[name]) for name in ("host", "pid", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def describe_holder(folder: Path) -> str:
    """The last holder in words."""
    holder = holder_of(folder)
    return "process {pid} on {host}, since {since}".format(**holder) if holder else "another process"
