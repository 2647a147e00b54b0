"""What every command returns: one number for each kind of end, so that scripts and schedulers need read no text."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a command ended. 1 is a mistake of moedist itself, 130 a Ctrl-C before anything had started."""

    DONE = 0
    CONFIG = 2
    NO_FIT = 3
    ENVIRONMENT = 4
    RANK_FAILED = 5
    PREEMPTED = 75  # sysexits' EX_TEMPFAIL: schedulers may start the run again


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.CONFIG: "configuration or data known to be bad before a rank starts",
    ExitCode.NO_FIT: "does not fit the device's memory",
    ExitCode.ENVIRONMENT: "environment or disk",
    ExitCode.RANK_FAILED: "a rank failed",
    ExitCode.PREEMPTED: "preempted and saved: start it again with `run.resume=auto`",
}
"""For people: the table of the README and the end of `moedist --help`."""


def describe_codes() -> str:
    """A line per code."""
    return "\n".join(f"  {code:<4}{meaning.replace('`', '')}" for code, meaning in MEANINGS.items())
