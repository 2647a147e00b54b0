"""One log for a run: every record to every sink, on global rank 0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from moedist.log.config import LogConfig
from moedist.log.sink.contract import RunInfo, Sink, Value


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

    def write(self, record: Mapping[str, Value]) -> None:
        """One log step; the record of a step is written once, whole, evaluation included."""
        for name, sink in list(self._sinks.items()):
            with self._guard(name):
                sink.write(record)

    def say(self, line: str) -> None:
        """One line of text for people. Any thread may call this."""
        for name, sink in list(self._sinks.items()):
            with self._guard(name):
                sink.say(line)

    def close(self, status: str) -> None:
        """Ends all sinks, the first one last, so that it can still tell of the others; a second call does nothing.

        Args:
            status: ``done``, ``preempted`` or ``failed``.
        """
        while self._sinks:
            name, sink = next(reversed(self._sinks.items()))
            with self._guard(name):
                sink.close(status)
            del self._sinks[name]

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a sink does, it must not end hours of training
            if name not in self._warned:
                self._warned.add(name)
                self.say(f"Warning: log.sinks.{name} failed: {type(error).__name__}: {error}. The run goes on.")
