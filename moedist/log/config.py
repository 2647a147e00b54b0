"""What a run logs and where it goes."""

from __future__ import annotations

import dataclasses

from moedist.config import Config, require
from moedist.log.alerts import AlertConfig
from moedist.log.sink.console import ConsoleConfig
from moedist.log.sink.contract import SinkConfig
from moedist.log.sink.jsonl import JsonlConfig
from moedist.log.sink.wandb import WandbConfig


def _default_sinks() -> dict[str, SinkConfig]:
    return {"console": ConsoleConfig(), "jsonl": JsonlConfig(), "wandb": WandbConfig()}


@dataclasses.dataclass(frozen=True)
class ChosenSteps(Config):
    """Some steps of a run; none by default.

    Attributes:
        steps: optimizer steps, counted from 1 as in ``train/step``.
        every: and every so many steps; None for none beside ``steps``.
    """

    steps: tuple[int, ...] = ()
    every: int | None = None

    def __post_init__(self) -> None:
        require(min(self.steps, default=1) >= 1, "steps", list(self.steps), "names no step", "The first step is 1.")
        require(self.every is None or self.every >= 1, "every", self.every, "is no number of steps", "Set 1 or more.")

    @property
    def on(self) -> bool:
        """Whether any step is meant."""
        return bool(self.steps) or self.every is not None

    def wants(self, step: int) -> bool:
        """Whether ``step`` is meant."""
        return step in self.steps or (self.every is not None and step % self.every == 0)


@dataclasses.dataclass(frozen=True)
class TraceConfig(ChosenSteps):
    """Steps whose routing is recorded, to ``<run>/traces`` (`moedist.moe.trace`)."""


@dataclasses.dataclass(frozen=True)
class PhasesConfig(ChosenSteps):
    """Steps whose phases are recorded on every rank, to ``<run>/traces`` (`moedist.train.phases`)."""


@dataclasses.dataclass(frozen=True)
class LogConfig(Config):
    """Metrics and their sinks.

    Attributes:
        dead_window: an expert is dead when no pair asked for it in this many last steps.
        max_scalar_keys: bound on the number of series in trackers that keep one per key; 48 layers x 128 experts would
            be 6,144 per quantity. What finds no room is not dropped: layers' numbers go into tables, and the files of
            the run folder hold everything (`moedist.log.series`).
        peak_tflops: what one device can do at most, in TFLOP/s, for ``train/mfu``; None to measure it at the start.
        alerts: when somebody is told that the run is sick.
        trace: steps whose routing is recorded.
        phases: steps of which it is recorded what every rank did when.
        sinks: where numbers go, by any name; none of them can stop a run.
    """

    dead_window: int = 100
    max_scalar_keys: int = 200
    peak_tflops: float | None = None
    alerts: AlertConfig = dataclasses.field(default_factory=AlertConfig)
    trace: TraceConfig = dataclasses.field(default_factory=TraceConfig)
    phases: PhasesConfig = dataclasses.field(default_factory=PhasesConfig)
    sinks: dict[str, SinkConfig] = dataclasses.field(default_factory=_default_sinks)

    def __post_init__(self) -> None:
        require(self.dead_window >= 1, "dead_window", self.dead_window, "is not a number of steps", "Set 1 or more.")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            "peak_tflops",
            self.peak_tflops,
            "is no speed",
            "Set the device's peak in TFLOP/s, or null.",
        )
        require(
            self.max_scalar_keys >= 0,
            "max_scalar_keys",
            self.max_scalar_keys,
            "is negative",
            "Set it to the number of keys that your tracker bears.",
        )
