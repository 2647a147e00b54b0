"""How a rank's part of a run ends: one reason, one exit code, one status file."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode
from moedist.log.run_log import RunLog
from moedist.mesh import Mesh
from moedist.train import flight_recorder
from moedist.train.checkpoint import CheckpointError, DiskError
from moedist.train.status import EXIT_CODES, Reason, read_status, write_status
from moedist.train.trainer import NonFiniteError, Progress
from moedist.train.watchdog import INTERVAL_S, SILENT_S, silent_ranks, who_is_missing

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|timeout|peer", re.IGNORECASE)
_REMEDY: dict[Reason, str] = {
    "config": "Mend the configuration and start again.",
    "data": "Restore the corpus, or start a new run.",
    "checkpoint": "Name another checkpoint, or start a new run in another run.dir.",
    "io": "Make room or mend the disk, then continue with run.resume=auto.",
    "nonfinite": "Continue from the last good checkpoint with a lower learning rate, or look at this step's data.",
    "peer_lost": "See the named rank's log, then continue with run.resume=auto.",
    "bug": "See the rank's log for the traceback; continue with run.resume=auto.",
    "preempted": "Continue with run.resume=auto.",
    "done": "",
}


class DataChangedError(RuntimeError):
    """The corpus is not the one that the checkpoint's run read."""


class Ending:
    """Entered around all that a rank does; an error inside becomes a status and an exit code, never a silent death.

    Attributes:
        log, progress: once they exist.
        exit_code: after the end.
    """

    def __init__(self, run_dir: Path, mesh: Mesh):
        self.run_dir, self.mesh = run_dir, mesh
        self.log: RunLog | None = None
        self.progress: Progress | None = None
        self.exit_code = EXIT_CODES["bug"]

    def at(self, reason: Reason, message: str) -> None:
        """An end that all ranks have agreed on; rank 0 writes it down."""
        if self.mesh.dp.rank == 0:
            self._write(reason, message, EXIT_CODES[reason])
        self._close("done" if reason == "done" else "preempted")
        self.exit_code = EXIT_CODES[reason]

    def __enter__(self) -> Ending:
        flight_recorder.forget(self.run_dir, self.mesh.dp.rank, self.mesh.dp.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if not isinstance(error, Exception):
            self._close("failed")
            return False
        traceback.print_exception(error, file=sys.stderr)
        reason, message, self.exit_code = self.explain(error)
        # The first cause wins: a lost peer is most often the echo of another rank's error.
        known = read_status(self.run_dir)
        if known is None or (known.reason == "peer_lost" and reason != "peer_lost"):
            self._write(reason, message, self.exit_code)
        if reason == "peer_lost":
            self._record()
        self._close("failed")
        return True

    def explain(self, error: Exception) -> tuple[Reason, str, int]:
        """Reason, message and exit code of an error."""
        reason: Reason = "bug"
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, torch.OutOfMemoryError):
            return "config", f"The run does not fit: {error}", ExitCode.NO_FIT
        if isinstance(error, ConfigError):
            reason, message = "config", str(error)
        elif isinstance(error, DataChangedError):
            reason, message = "data", str(error)
        elif isinstance(error, DiskError):
            reason, message = "io", str(error)
        elif isinstance(error, CheckpointError):
            reason, message = "checkpoint", str(error)
        elif isinstance(error, NonFiniteError):
            reason, message = "nonfinite", str(error)
        elif isinstance(error, OSError):
            reason = "io"
        elif isinstance(error, RuntimeError) and _LOST.search(str(error)):
            reason = "peer_lost"
            missing = self._find_missing()
            message = f"{missing} ({str(error).splitlines()[0]})"
        return reason, message, EXIT_CODES[reason]

    def _find_missing(self) -> str:
        """Who is missing. A node that is lost falls silent only `SILENT_S` later, so with several nodes it is waited
        for, unless the launcher of the node where a rank was killed has told the cause meanwhile."""
        logs, size = self.run_dir / "logs", self.mesh.dp.size
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) < size:
            deadline = time.monotonic() + SILENT_S + 2 * INTERVAL_S
            while not silent_ranks(logs, size) and read_status(self.run_dir) is None and time.monotonic() < deadline:
                time.sleep(INTERVAL_S)
        return who_is_missing(logs, size)

    def _record(self) -> None:
        """Leaves what this rank asked of the others last."""
        try:
            flight_recorder.dump(self.run_dir, self.mesh.dp.rank)
        except (OSError, RuntimeError, AttributeError) as failure:  # torch keeps it private
            print(f"the flight recorder cannot be written: {failure}", file=sys.stderr)

    def _write(self, reason: Reason, message: str, exit_code: int) -> None:
        good = self.run_dir / "checkpoints" / "latest"
        try:
            latest = good.parent / good.read_text().strip() if good.is_file() else None
            write_status(
                self.run_dir,
                reason,
                message,
                exit_code=exit_code,
                rank=None if reason in ("done", "preempted") else self.mesh.dp.rank,
                step=None if self.progress is None else self.progress.step,
                last_good_checkpoint=latest,
                what_to_do=self._what_to_do(reason),
            )
        except OSError as failure:
            print(f"status.json cannot be written: {failure}", file=sys.stderr)

    def _what_to_do(self, reason: Reason) -> str:
        how = flight_recorder.how_to_read(self.run_dir) if reason == "peer_lost" else ""
        return f"{_REMEDY[reason]} {how}".strip()

    def _close(self, status: str) -> None:
        if self.log is not None:
            self.log.close(status)
            self.log = None
