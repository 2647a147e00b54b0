"""A sink that holds a run at a known place: for tests that signal or kill it there."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from moedist.log.sink.contract import RunInfo, Sink, SinkConfig, Value, step_of

GATE = "OUTSIDE_GATE"
"""Environment variable: the first step at whose record the run waits; unset for never."""


@dataclasses.dataclass(frozen=True)
class GateConfig(SinkConfig):
    """At the gate's step the file ``gate_reached`` appears, and the run waits for ``gate_open``."""

    limit_s: float = 120.0

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Gate:
        return Gate(run.directory, int(os.environ[GATE]) if GATE in os.environ else None, self.limit_s)


class Gate(Sink):
    def __init__(self, folder: Path, step: int | None, limit_s: float):
        self.folder, self.step, self.limit_s = folder, step, limit_s

    def write(self, record: Mapping[str, Value]) -> None:
        if self.step is None or step_of(record) < self.step:
            return
        (self.folder / "gate_reached").write_text(str(step_of(record)))
        deadline = time.monotonic() + self.limit_s
        while not (self.folder / "gate_open").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self, status: str) -> None:
        (self.folder / "gate_closed").write_text(status)
