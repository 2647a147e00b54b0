"""A rank of ``moedist doctor`` that stops: ``python -m tests.doctor.rank_that_stops WHERE RANK FOLDER DEVICE LIMIT_S``.

WHERE is ``start``, ``dies``, the name of a phase (it never comes to it), ``in`` and a phase (it comes, and is stopped
there), or ``asleep in`` and a phase (its threads go on).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from moedist.doctor import __main__ as program
from moedist.doctor.ranks import Trial
from moedist.doctor.roll_call import RollCall


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_at(phase: str) -> None:
    begin = RollCall.begin

    def stopping(roll: RollCall, name: str, word: str = "here") -> list[tuple[str, float]]:
        if name == phase:
            stop()
        return begin(roll, name, word)

    RollCall.begin = stopping


def stop_in(phase: str, how: Callable[[], object] = stop) -> None:
    whole = Trial._times

    def stopping(trial: Trial, *args: object) -> list[float]:
        if entered[-1] == phase:
            how()
        return whole(trial, *args)

    entered: list[str] = []
    init = Trial.__init__

    def noting(trial: Trial, mesh: object, roll: object, enter: object) -> None:
        init(trial, mesh, roll, lambda name: (entered.append(name), enter(name)))

    Trial._times, Trial.__init__ = stopping, noting


if __name__ == "__main__":
    where, rank = sys.argv[1], sys.argv[2]
    del sys.argv[1:3]
    if os.environ["RANK"] == rank:
        if where == "start":
            stop()
        elif where == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif where.startswith("in "):
            stop_in(where.removeprefix("in "))
        elif where.startswith("asleep in "):
            stop_in(where.removeprefix("asleep in "), threading.Event().wait)
        else:
            stop_at(where)
    sys.exit(program.main())
