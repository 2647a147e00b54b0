"""Where numbers go. A sink never stops a run: what it cannot deliver it drops with one warning, or keeps for later."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moedist.config import Choice, require

Value = float | int | str | bool | list[Any] | np.ndarray | None
"""A metric: a number, a list with a number for each MoE layer, or an [L, E] array over layers and experts by global id
(`moedist.log.metrics`)."""


def step_of(record: Mapping[str, Value]) -> int:
    """The optimizer step of a record."""
    step = record["train/step"]
    assert isinstance(step, int), f"train/step is {step!r}"
    return step


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a sink may know of the run.

    Attributes:
        directory: the run folder, which exists; a sink writes below it only.
        name: the run's name for people.
        run_id: stable id of the run, the same after a resume (kept in checkpoints): 8 letters and digits.
        group_id: id of the run that this one began as, before its configuration was changed or it branched off; its own
            ``run_id`` for most.
        began_step: the step behind which it is this run; more than 0 where ``group_id`` is another's.
        resumed_step: the step that this process resumes from; 0 for a fresh start. Records up to the last step that a
            sink already holds and beyond ``resumed_step`` are replays.
        config: the run's configuration as plain mappings, values from the environment unresolved.
        environment: code revision, versions and hardware, as plain mappings.
        num_steps: the last step of the run.
        device: a word on the hardware (``4 x cpu``).
        max_scalar_keys: bound on the series of sinks that keep one per key.
        terminal: where people look; the rank's own stdout may be a log file.
    """

    directory: Path
    name: str
    run_id: str
    group_id: str
    resumed_step: int
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    num_steps: int
    device: str
    began_step: int = 0
    max_scalar_keys: int = 200
    terminal: TextIO = dataclasses.field(default_factory=lambda: sys.stdout)


def need_package(name: str, extra: str) -> None:
    """Raises `ConfigError` unless an optional package is installed."""
    require(
        importlib.util.find_spec(name) is not None,
        "kind",
        extra,
        f"needs the package {name}, which is not installed",
        f"Run: pip install 'moedist[{extra}]'",
    )


class Sink:
    """Takes records on global rank 0; a subclass does more with what it has a use for. Nothing waits for a network."""

    def write(self, record: Mapping[str, Value]) -> None:
        """One log step: keys are metric names (moedist.log.metrics), ``train/step`` always among them. Each step comes
        once per process, evaluation included.
        """
        raise NotImplementedError

    def say(self, line: str) -> None:
        """One line of text for people (yardsticks, warnings, where things lie)."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is complete."""

    def alert(self, title: str, text: str) -> None:
        """Something that somebody should be told of at once (`moedist.log.alerts`)."""

    def close(self, status: str) -> None:
        """Ends the record within ten seconds, or thirty where the run is done and nothing will send the rest.

        Args:
            status: ``done``, ``preempted`` or ``failed``.
        """


@dataclasses.dataclass(frozen=True)
class SinkConfig(Choice, path="log.sink"):
    """One place where numbers go."""

    def check(self) -> None:
        """Raises `ConfigError` where this sink cannot work on this machine; called before a rank starts."""

    def open(self, run: RunInfo, say: Callable[[str], None]) -> Sink:
        """Opens the sink for a run; called on global rank 0 only.

        Args:
            run: what the sink may know of it.
            say: tells people one line, such as a warning; may be called from any thread.
        """
        raise NotImplementedError
