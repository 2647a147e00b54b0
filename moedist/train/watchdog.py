"""Who waits where: a heartbeat per rank, and an end for a rank that is stuck.

A collective that times out says how long it waited and not for whom. So each rank leaves a small file,
`heartbeat_<rank>.json`, that says what it is doing and since when; whoever gives up reads them all (`who_is_missing`).
And because a process can hang where no time-out reaches (in a driver, a file system, a lock), a thread of its own
watches the same clock and kills the process, so that the launcher can start the ranks again.
Another one writes the file, because the disk may be what hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

INTERVAL_S = 1.0
"""Seconds between two looks at the clock, and between two heartbeats."""
LAST_WORDS_S = 5.0
"""Seconds that a process gets to say why it is ended."""
SILENT_S = 10.0
"""Seconds without a heartbeat after which a process is taken for stopped, dead or cut off."""


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a rank was doing when it last wrote.

    Attributes:
        rank: its global rank.
        step: the optimizer step that it is in.
        phase: what it does there: ``forward``, ``save``, ...
        since: when that phase began, seconds since the epoch.
        written: when this was written, likewise.
        host: the machine.
        pid: the process on it.
    """

    rank: int
    step: int
    phase: str
    since: float
    written: float
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid}) in {self.phase} of step {self.step}"


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its heartbeat; ``folder`` is ``<run>/logs``."""
    return folder / f"heartbeat_{rank}.json"


class Watchdog:
    """Tells what this rank does, and ends it when it does one thing for too long.

    Entering a phase costs an assignment, so a loop can name as many as it likes; threads do the rest.

        with Watchdog(run / "logs", rank, limit_s=mesh.timeout_s + 30) as watchdog:
            watchdog.enter("forward", step)
            ...
            watchdog.enter("save", step, limit_s=mesh.save_timeout_s + 30)

    It cannot see a process that is stopped as a whole or holds Python's lock for ever; the other ranks name such a one.

    Args:
        folder: where heartbeats go; writing there is tried and never waited for nor insisted on.
        rank: this rank.
        limit_s: seconds that a phase may last unless it says otherwise: more than the process group's time-out, so that
            a collective which can raise does so first, with a better message.
        clock: seconds that only go forward.
        wall: seconds since the epoch; for people, never for the limit.
        end: called with the reason when a phase is over its limit; must not return to the phase.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        limit_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        end: Callable[[str], None] | None = None,
    ):
        self.path = heartbeat_path(folder, rank)
        self.rank = rank
        self.limit_s = limit_s
        self._clock, self._wall, self._end = clock, wall, end or _kill
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._now = ("start", 0, clock(), math.inf)  # one tuple, so that no thread sees half of a change
        self._stop = threading.Event()

    def enter(self, phase: str, step: int, limit_s: float | None = None) -> None:
        """The rank now does ``phase`` of ``step``.

        Args:
            limit_s: seconds that this phase may last; None for the usual, infinity for no limit.
        """
        self._now = (phase, step, self._clock(), self.limit_s if limit_s is None else limit_s)

    def write(self) -> None:
        """Leaves the heartbeat; called every second by a thread."""
        with contextlib.suppress(OSError):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(dataclasses.asdict(self._heartbeat())))
            temporary.replace(self.path)

    def check(self) -> None:
        """Ends the process if it is stuck; called every second by a thread."""
        *_, began, limit_s = self._now
        held = self._clock() - began
        if held > limit_s:
            beat = self._heartbeat()
            self._end(f"{beat} for {held:.0f} s, longer than the {limit_s:.0f} s it may take: ended by the watchdog")

    def __enter__(self) -> Watchdog:
        for work in (self.write, self.check):
            threading.Thread(target=self._repeat, args=(work,), name=f"watchdog {work.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()  # the threads are daemons and not waited for: a dead disk may hold one

    def _heartbeat(self) -> Heartbeat:
        phase, step, began, _ = self._now
        wall = self._wall()
        return Heartbeat(self.rank, step, phase, wall - (self._clock() - began), wall, self._host, self._pid)

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            work()
            self._stop.wait(INTERVAL_S)


def _kill(reason: str) -> None:
    """Says why and where every thread is, then ends the process: one that is stuck may not hear anything softer."""
    last = threading.Timer(LAST_WORDS_S, os.kill, (os.getpid(), signal.SIGKILL))
    last.daemon = True
    last.start()  # the log may be on the disk that hangs
    print(reason, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os.kill(os.getpid(), signal.SIGKILL)


def who_is_missing(folder: Path, world_size: int, wall: Callable[[], float] = time.time) -> str:
    """Which ranks the others wait for, as a sentence: for the message of a collective that timed out.

    Missing are those that have fallen silent; among the rest those in the lowest step; and where all are in one step,
    those in the phase that has lasted longest.

    Args:
        folder: where the heartbeats are.
        world_size: ranks of the run.
        wall: seconds since the epoch.
    """
    now = wall()
    beats = {rank: _read(heartbeat_path(folder, rank)) for rank in range(world_size)}
    found = [beat for beat in beats.values() if beat is not None]
    alive = [beat for beat in found if now - beat.written <= SILENT_S]
    lines = [f"rank {rank} has left no heartbeat" for rank, beat in beats.items() if beat is None]
    lines += [f"{beat} has been silent for {now - beat.written:.0f} s" for beat in found if beat not in alive]
    lines += [f"{beat} for {now - beat.since:.0f} s, {_ahead(beat, alive)}" for beat in _behind(alive)]
    everywhere = f"no rank is behind: all {world_size} are in {found[0].phase} of step {found[0].step}" if found else ""
    return "; ".join(lines) or everywhere


def silent_ranks(folder: Path, world_size: int, wall: Callable[[], float] = time.time) -> list[int]:
    """Ranks that have fallen silent: their process, machine or way to the disk is gone."""
    beats = [_read(heartbeat_path(folder, rank)) for rank in range(world_size)]
    return [beat.rank for beat in beats if beat is not None and wall() - beat.written > SILENT_S]


def _behind(alive: list[Heartbeat]) -> list[Heartbeat]:
    """Those in the lowest step, or in the oldest phase of the one step; none where all do the same."""
    if len({(beat.step, beat.phase) for beat in alive}) <= 1:
        return []
    lowest = min(beat.step for beat in alive)
    if any(beat.step > lowest for beat in alive):
        return [beat for beat in alive if beat.step == lowest]
    oldest = min(alive, key=lambda beat: beat.since)
    return [beat for beat in alive if beat.phase == oldest.phase]


def _ahead(beat: Heartbeat, alive: list[Heartbeat]) -> str:
    others = [other for other in alive if (other.step, other.phase) != (beat.step, beat.phase)]
    first = max(others, key=lambda other: (other.step, other.since))
    return f"while others are in {first.phase} of step {first.step}"


def _read(path: Path) -> Heartbeat | None:
    try:
        return Heartbeat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
