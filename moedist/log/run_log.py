"""One log for a run: every record to every sink, on global rank 0."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from moedist.log.alerts import Alert, Alerts
from moedist.log.config import LogConfig
from moedist.log.sink.contract import RunInfo, Sink, Value

LISTEN_S = 5.0
"""Seconds between two looks at whether the run stalls."""


class RunLog:
    """Fans records out to the sinks of a run; on other ranks than 0 it does nothing.

    A sink that raises loses that record and is told of once; the run and the other sinks go on.

    Args:
        config: which sinks.
        run: what they may know.
        rank: global rank of this process.
    """

    def __init__(self, config: LogConfig, run: RunInfo, rank: int):
        self._sinks: dict[str, Sink] = {}
        self._warned: set[str] = set()
        for name, sink in config.sinks.items() if rank == 0 else ():
            with self._guard(name):
                self._sinks[name] = sink.open(run, self.say)
        self._alerts, self._closed = Alerts(config.alerts), threading.Event()
        if self._sinks:
            threading.Thread(target=self._listen, name="log", daemon=True).start()

    def write(self, record: Mapping[str, Value]) -> None:
        """One log step; the record of a step is written once, whole, evaluation included."""
        self._each(lambda sink: sink.write(record))
        for alert in self._alerts.of(record) if self._sinks else ():
            self._tell(alert)

    def say(self, line: str) -> None:
        """One line of text for people. Any thread may call this."""
        self._each(lambda sink: sink.say(line))

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is complete."""
        self._each(lambda sink: sink.saved(step, checkpoint))

    def alert(self, alert: Alert) -> None:
        """Tells of something at once, unless its kind was told of a while ago. Any thread may call this."""
        if self._alerts.due(alert):
            self._tell(alert)

    def close(self, status: str) -> None:
        """Ends all sinks, the first one last, so that it can still tell of the others; a second call does nothing.

        Args:
            status: ``done``, ``preempted`` or ``failed``.
        """
        self._closed.set()
        while self._sinks:
            name, sink = next(reversed(self._sinks.items()))
            with self._guard(name):
                sink.close(status)
            del self._sinks[name]

    def _tell(self, alert: Alert) -> None:
        self._each(lambda sink: sink.alert(alert.title, alert.text))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._guard(name):
                call(sink)

    def _listen(self) -> None:
        """Notices when records stay away."""
        while not self._closed.wait(LISTEN_S):
            if (alert := self._alerts.silence()) is not None:
                self._tell(alert)

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a sink does, it must not end hours of training
            if name not in self._warned:
                self._warned.add(name)
                self.say(f"Warning: log.sinks.{name} failed: {type(error).__name__}: {error}. The run goes on.")
