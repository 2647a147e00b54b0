"""Each rank's output in a file of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO


def redirect_output(run_dir: Path, rank: int) -> TextIO | None:
    """Sends everything this process writes to ``<run>/logs/rank_<rank>.log``, that of its libraries too.

    Works on the file descriptors 1 and 2, so output of C++ code and of child processes goes there as well.

    Args:
        run_dir: the run folder.
        rank: global rank.

    Returns:
        rank 0: the standard output it had before, for what people shall see; other ranks: None.

    Raises:
        OSError: the file cannot be written.
    """
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace") if rank == 0 else None
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    return terminal
