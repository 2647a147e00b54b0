"""Which rank the others waited for: what every rank did in a recorded step, on one clock.

The phases are those that the watchdog hears of (`Trainer.enter`), with every exchange of rows inside of them. A barrier
at the beginning of the step starts all clocks. On CUDA a recorded step waits for the device at every mark, so that a
span is the work's and not its launch's; such a step is slower than others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moedist.mesh import Mesh
from moedist.mesh.collectives import barrier, gather_json
from moedist.mesh.meter import ExchangeMeter, current_meter, measuring

EXCHANGE = "exchange"
MEETINGS = (EXCHANGE, "agree", "optimizer", "metrics")
"""Phases in which a rank waits for others: those of its expert-parallel group in an exchange, else all."""


@dataclasses.dataclass(frozen=True)
class Span:
    """One phase of one rank.

    Attributes:
        phase: its name.
        begin_s, end_s: seconds since the barrier.
        within: the phase that an exchange lies in; None for a phase itself.
    """

    phase: str
    begin_s: float
    end_s: float
    within: str | None = None


@dataclasses.dataclass(frozen=True)
class Straggler:
    """Whom the others waited for, and in what.

    Attributes:
        rank: the one whose lateness cost the others most.
        phase: what it did when they had arrived already.
        waited_s: seconds that the other ranks waited for it there, added up over them.
        share: of all waiting of the step.
    """

    rank: int
    phase: str
    waited_s: float
    share: float

    def __str__(self) -> str:
        return (
            f"the others waited {1e3 * self.waited_s:.1f} ms (added up) for rank {self.rank} in {self.phase}, "
            f"{self.share:.0%} of all waiting"
        )


class PhaseRecorder:
    """One rank's phases of the steps that are recorded; costs a comparison in others.

    Args:
        mesh: who the ranks are.
        clock: seconds that only go forward.
    """

    def __init__(self, mesh: Mesh, clock: Callable[[], float] = time.perf_counter):
        self.mesh, self._clock = mesh, clock
        self._marks: list[tuple[str, float]] | None = None
        self._exchanges: list[Span] = []
        self._zero = 0.0

    @property
    def on(self) -> bool:
        """Whether a step is being recorded."""
        return self._marks is not None

    def begin(self) -> None:
        """Recording begins; called by all ranks, which meet here."""
        barrier(self.mesh.dp, self.mesh.device)
        self._zero, self._marks, self._exchanges = self._clock(), [], []

    def enter(self, phase: str) -> None:
        """This rank now does ``phase``."""
        if self._marks is not None:
            self._marks.append((phase, self._now()))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Around what exchanges rows; whoever measures them already goes on doing so."""
        with measuring(_Listener(self, current_meter())) if self.on else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Around an exchange."""
        assert self._marks is not None
        begin_s = self._now()
        yield
        self._exchanges.append(Span(EXCHANGE, begin_s, self._now(), within=self._marks[-1][0]))

    def end(self) -> list[list[Span]]:
        """Recording ends; called by all ranks. The spans of every rank, on rank 0; of this one elsewhere."""
        assert self._marks is not None
        marks, self._marks = [*self._marks, ("", self._now())], None
        phases = [Span(name, begin, end) for (name, begin), (_, end) in zip(marks, marks[1:], strict=False)]
        spans = sorted([*phases, *self._exchanges], key=lambda span: span.begin_s)
        gathered = gather_json([dataclasses.astuple(span) for span in spans], self.mesh.dp, self.mesh.device)
        return [[Span(*values) for values in found] for found in gathered]

    def _now(self) -> float:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return self._clock() - self._zero


class _Listener(ExchangeMeter):
    """Hears of exchanges, and lets whoever measured before hear of them too."""

    def __init__(self, recorder: PhaseRecorder, other: ExchangeMeter | None):
        super().__init__(recorder.mesh.device)
        self._recorder, self._other = recorder, other

    @contextlib.contextmanager
    def exchange(self, bytes_sent: int, bytes_arrived: int) -> Iterator[None]:
        other = contextlib.nullcontext() if self._other is None else self._other.exchange(bytes_sent, bytes_arrived)
        with self._recorder.exchange(), other:
            yield


def find_straggler(ranks: Sequence[Sequence[Span]], ep: int = 1) -> Straggler | None:
    """Which rank, in which phase, the others waited for most; None where nobody waited.

    All ranks meet in the same order. At each meeting those that have arrived wait until the last one arrives; that time
    counts against what the last one did just before, its phase or the one that its exchange lies in.

    Args:
        ranks: each rank's spans in the order of their beginnings.
        ep: ranks per expert-parallel group, in the order of ranks: they meet in an exchange.

    >>> def spans(end_s): return [Span("data", 0, end_s), Span("agree", end_s, 2.0)]
    >>> find_straggler([spans(0.5), spans(1.5), spans(0.75)], ep=3)
    Straggler(rank=1, phase='data', waited_s=1.75, share=1.0)
    """
    meetings = [_meetings(spans) for spans in ranks]
    waited: dict[tuple[int, str], float] = defaultdict(float)
    for place in range(min(map(len, meetings), default=0)):
        is_exchange = meetings[0][place][0].phase == EXCHANGE
        size = ep if is_exchange else len(ranks)
        for first in range(0, len(ranks), size):
            group = range(first, min(first + size, len(ranks)))
            last = max(group, key=lambda rank: meetings[rank][place][0].begin_s)
            span, cause = meetings[last][place]
            waited[last, cause] += sum(span.begin_s - meetings[rank][place][0].begin_s for rank in group)
    total = sum(waited.values())
    if total <= 0:
        return None
    (rank, phase), seconds = max(waited.items(), key=lambda item: item[1])
    return Straggler(rank, phase, seconds, seconds / total)


def _meetings(spans: Sequence[Span]) -> list[tuple[Span, str]]:
    """The meetings of a rank, and what it did before each of them."""
    found, before = [], "start"
    for span in spans:
        if span.phase in MEETINGS:
            found.append((span, span.within or before))
        if span.within is None:
            before = span.phase
    return found


def chrome_trace(ranks: Sequence[Sequence[Span]], step: int, straggler: Straggler | None) -> dict[str, Any]:
    """The spans as Perfetto and chrome://tracing read them: a process per rank, times in microseconds. The straggler's
    name says whom it is that the others waited for.

    Format: "Trace Event Format", complete events (``ph: X``) and metadata (``ph: M``).
    """
    events: list[Mapping[str, Any]] = []
    for rank, spans in enumerate(ranks):
        late = f" (waited for in {straggler.phase})" if straggler is not None and straggler.rank == rank else ""
        for key, args in {
            "process_name": {"name": f"rank {rank}{late}"},
            "process_sort_index": {"sort_index": rank},
            "thread_name": {"name": "phases"},
        }.items():
            events.append({"name": key, "ph": "M", "pid": rank, "tid": 0, "args": args})
        for span in spans:
            times = {"ts": round(1e6 * span.begin_s, 3), "dur": round(1e6 * (span.end_s - span.begin_s), 3)}
            category = "phase" if span.within is None else span.phase
            events.append({"name": span.phase, "cat": category, "ph": "X", "pid": rank, "tid": 0, **times})
    named = None if straggler is None else dataclasses.asdict(straggler)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"step": step, "straggler": named}}


def write_phases(folder: Path, trace: Mapping[str, Any], step: int) -> Path:
    """Writes a merged trace, whole or not at all; returns the file.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"phases_{step:08d}.json"
    draft = folder / f".{path.name}.{os.getpid()}"
    try:
        draft.write_text(json.dumps(trace) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path
