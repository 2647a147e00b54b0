"""How a run ended: `<run>/status.json`, written by whoever knows, read by the command that started the run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Literal, get_args

from moedist.config.exit_codes import ExitCode

Reason = Literal["done", "config", "data", "checkpoint", "io", "nonfinite", "peer_lost", "bug", "preempted"]

STATUS = "status.json"

EXIT_CODES: dict[Reason, int] = {
    "done": ExitCode.DONE,
    "config": ExitCode.CONFIG,
    "data": ExitCode.RANK_FAILED,
    "checkpoint": ExitCode.RANK_FAILED,
    "io": ExitCode.ENVIRONMENT,
    "nonfinite": ExitCode.RANK_FAILED,
    "peer_lost": ExitCode.RANK_FAILED,
    "bug": ExitCode.RANK_FAILED,
    "preempted": ExitCode.PREEMPTED,
}
"""What the command returns for each reason, where ranks had started."""


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run ended.

    Attributes:
        reason: one word.
        exit_code: of the command.
        message: what happened, in a sentence or more.
        rank: the global rank that it happened on first, where known.
        step: optimizer steps done, where known.
        last_good_checkpoint: path of the newest verified checkpoint; None for none.
        what_to_do: the next thing to try, as a sentence.
        time: when, ISO 8601 with the zone.
    """

    reason: Reason
    exit_code: int
    message: str
    rank: int | None = None
    step: int | None = None
    last_good_checkpoint: str | None = None
    what_to_do: str = ""
    time: str = ""


def write_status(
    run_dir: Path,
    reason: Reason,
    message: str,
    *,
    exit_code: int | None = None,
    rank: int | None = None,
    step: int | None = None,
    last_good_checkpoint: Path | str | None = None,
    what_to_do: str = "",
) -> Status:
    """Replaces the status of a run, atomically: a reader sees the old one or the new one, never half.

    Args:
        run_dir: the run folder.
        reason: one word; `EXIT_CODES` gives its exit code unless ``exit_code`` says another.
        message, rank, step, last_good_checkpoint, what_to_do: as in `Status`.

    Raises:
        OSError: the folder cannot be written.
    """
    status = Status(
        reason=reason,
        exit_code=EXIT_CODES[reason] if exit_code is None else exit_code,
        message=message,
        rank=rank,
        step=step,
        last_good_checkpoint=None if last_good_checkpoint is None else str(last_good_checkpoint),
        what_to_do=what_to_do,
        time=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    draft = run_dir / f".{STATUS}.{os.getpid()}"
    try:
        draft.write_text(json.dumps(dataclasses.asdict(status), indent=2) + "\n", encoding="utf-8")
        draft.replace(run_dir / STATUS)
    finally:
        draft.unlink(missing_ok=True)
    return status


def read_status(run_dir: Path) -> Status | None:
    """The status of a run; None where there is none that can be read."""
    try:
        fields = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
        status = Status(**fields)
    except (OSError, ValueError, TypeError):
        return None
    return status if status.reason in get_args(Reason) else None


def clear_status(run_dir: Path) -> None:
    """Takes the status of an earlier start away, so that it is not taken for this one's."""
    (run_dir / STATUS).unlink(missing_ok=True)
