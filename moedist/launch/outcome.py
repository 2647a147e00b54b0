"""How a launch ended: from what the ranks and the launcher left behind (`status.json`, its log), one `Status`."""

from __future__ import annotations

import dataclasses
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moedist.config.exit_codes import ExitCode
from moedist.train.status import EXIT_CODES, Reason, Status, write_status

if TYPE_CHECKING:
    from moedist.train.config import LaunchConfig

Stop = Literal["none", "asked", "late", "at_once", "lost"]
"""How a launch was stopped from outside: not, politely, or killed: for being late, at a second Ctrl-C, for a
rendezvous that nobody answers at."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first failure that torchrun saw.

    Attributes:
        rank: global rank.
        exit_code: of its process; minus the signal's number where a signal ended it.
    """

    rank: int
    exit_code: int

    @property
    def signal_name(self) -> str | None:
        """The signal that ended it; None for an exit of its own."""
        if self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"


def first_failure(said: str) -> Failure | None:
    """The root cause in torchrun's report; None where it has none."""
    report = said.rpartition("Root Cause (first observed failure)")[2]
    found = re.search(r"rank\s*:\s*(\d+) \(local_rank.*?exitcode\s*:\s*(-?\d+)", report, re.DOTALL)
    return Failure(int(found[1]), int(found[2])) if found else None


def conclude(
    run_dir: Path, returncode: int, said: str, stop: Stop, launch: LaunchConfig, status: Status | None
) -> Status:
    """How the ranks ended, from what they and the launcher left behind; written to `status.json` where it is not there.

    Args:
        run_dir: the run folder.
        returncode: the launcher's.
        said: what the launcher wrote.
        stop: whether this process was asked to stop.
        launch: of the run.
        status: what the ranks wrote; None where they wrote nothing.
    """
    failure = first_failure(said)
    if returncode == 0:
        return status or write_status(run_dir, "done", "All ranks ended well.")
    if stop == "at_once":
        return _stopped(run_dir, status, "The ranks were killed at a second interrupt, before they had saved.")
    if stop == "late":
        given = f"launch.stop_after_s = {launch.stop_after_s:g} s"
        message = f"The ranks were killed {given} after the signal, before they had saved."
        return _stopped(run_dir, status, message)
    by_signal = failure is not None and failure.signal_name is not None
    if status is not None and status.reason != "done" and not (status.reason == "peer_lost" and by_signal):
        return status
    if stop == "asked" and (failure is None or by_signal or failure.exit_code == 75):
        message = "Stopped before the first step: there was nothing to save."
        return write_status(run_dir, "preempted", message, what_to_do=_how_to_go_on(run_dir))
    if failure is None:
        return _launcher_failed(run_dir, said, launch, lost=stop == "lost")
    if status is None and failure.exit_code in (ExitCode.CONFIG, ExitCode.ENVIRONMENT):
        return _refused(failure.exit_code, said)
    checkpoint = last_good_checkpoint(run_dir)
    if by_signal:
        message = f"Rank {failure.rank} was ended by {failure.signal_name}."
        hint = " SIGKILL often is the kernel short of memory: see dmesg." if failure.exit_code == -9 else ""
        step = status.step if status is not None else None
        return write_status(
            run_dir,
            "peer_lost",
            message,
            rank=failure.rank,
            step=step,
            last_good_checkpoint=checkpoint,
            what_to_do=_how_to_go_on(run_dir) + hint,
        )
    when = " after the run was done" if status is not None and status.reason == "done" else ""
    return write_status(
        run_dir,
        "bug",
        f"Rank {failure.rank} failed{when} (exit code {failure.exit_code}): {last_line(run_dir, failure.rank)}",
        rank=failure.rank,
        last_good_checkpoint=checkpoint,
        what_to_do=f"See {rank_log(run_dir, failure.rank)}.",
    )


def _stopped(run_dir: Path, status: Status | None, message: str) -> Status:
    if status is not None and status.reason != "peer_lost":
        return status  # what the ranks managed to say themselves is better
    return write_status(
        run_dir,
        "preempted",
        message,
        exit_code=5,
        last_good_checkpoint=last_good_checkpoint(run_dir),
        what_to_do=_how_to_go_on(run_dir),
    )


def _launcher_failed(run_dir: Path, said: str, launch: LaunchConfig, *, lost: bool = False) -> Status:
    """Torchrun ended without a rank to blame: mostly it could not meet the others."""
    text = said.strip().splitlines()
    last = text[-1] if text else "torchrun ended without a word"
    if re.search(r"EADDRINUSE|[Aa]ddress already in use", said):
        message = f"launch.rendezvous = {launch.rendezvous!r} is taken by another program."
        remedy = (
            "Set launch.rendezvous to a free port of the first node; where nodes share a machine, "
            "launch.holds_rendezvous to false on all but one."
        )
        return write_status(run_dir, "io", message, what_to_do=remedy)
    if lost or re.search(r"Rendezvous\w*Error|RendezvousTimeout|Dist(?:Network|Store)Error", said):
        logs = sorted((run_dir / "logs").glob("launcher_*.log"))
        came = ", ".join(log.stem.removeprefix("launcher_") for log in logs)
        message = (
            f"{launch.nnodes} nodes did not meet at launch.rendezvous = {launch.rendezvous!r}, or the node that holds "
            f"it is gone. Nodes that have ever started this run: {came or 'none'}. {last}"
        )
        remedy = "See that all nodes run the same command, and that they reach the first node's address and port."
        return write_status(run_dir, "io", message, what_to_do=remedy)
    return write_status(
        run_dir, "bug", f"The launcher failed: {last}", what_to_do=f"See {launcher_log(run_dir, launch.nnodes)}."
    )


def _refused(exit_code: int, said: str) -> Status:
    """Rank 0 would not begin. Nothing is written: the folder may be another run's."""
    start = "moedist train: "
    lines = [line.removeprefix(start) for line in said.splitlines() if line.startswith(start)]
    reason: Reason = "config" if exit_code == ExitCode.CONFIG else "io"
    return Status(reason, exit_code, "\n".join(lines) or "Rank 0 refused to begin; its node's launcher log says why.")


def unwritten(run_dir: Path, error: OSError) -> Status:
    """An end that nobody could write down: the ranks' own words are lost to the same disk."""
    checkpoint = last_good_checkpoint(run_dir)
    return Status(
        "io",
        EXIT_CODES["io"],
        f"The run failed, and {run_dir} cannot be written: {error.strerror}.",
        last_good_checkpoint=None if checkpoint is None else str(checkpoint),
        what_to_do=f"Make room or mend the disk. {_how_to_go_on(run_dir)}",
    )


def last_good_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder whose files have the sizes that its manifest says; None for none."""
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    if not folders:
        return None
    from moedist.train.checkpoint.errors import CheckpointError
    from moedist.train.checkpoint.manifest import check_sizes

    for path in folders:
        try:
            check_sizes(path)
        except CheckpointError:
            continue
        return path
    return None


def launcher_log(run_dir: Path, nnodes: int) -> Path:
    """Where torchrun's own words go; a file per node, because nodes share the folder."""
    return run_dir / "logs" / ("launcher.log" if nnodes == 1 else f"launcher_{socket.gethostname()}.log")


def rank_log(run_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return run_dir / "logs" / f"rank_{rank}.log"


def tail(path: Path, num_lines: int = 20) -> list[str]:
    """The last lines of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except OSError:
        return []


def last_line(run_dir: Path, rank: int) -> str:
    """The last line of a rank's log that is not empty: of an exception, its message."""
    lines = [line.strip() for line in tail(rank_log(run_dir, rank)) if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def _how_to_go_on(run_dir: Path) -> str:
    return f"Continue with the same command and run.dir={run_dir} run.resume=auto."
