"""What somebody should be told of at once, and not too often."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from moedist.config import Config, require
from moedist.log.sink.contract import Value, step_of

Kind = Literal["nan", "collapse", "drops", "stall"]


@dataclasses.dataclass(frozen=True)
class Alert:
    """One thing to tell."""

    kind: Kind
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class AlertConfig(Config):
    """When somebody is told that a run is sick; null for never.

    Attributes:
        warmup_steps: the first steps, in which any router is unbalanced; no alert of drops or collapse before.
        drop_rate: ``moe/drop_rate`` above this.
        load_entropy: ``moe/load_entropy`` below this, in the mean over layers: the router collapses.
        stall_s: seconds without a record, and five times the longest that it took so far.
        every_s: seconds between two alerts of one kind.
    """

    warmup_steps: int = 100
    drop_rate: float | None = 0.5
    load_entropy: float | None = 0.5
    stall_s: float | None = 600.0
    every_s: float = 3600.0

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "is negative", "Set 0 or more.")
        require(self.every_s >= 0, "every_s", self.every_s, "is negative", "Set 0 or more seconds.")
        for key in ("drop_rate", "load_entropy"):
            value = getattr(self, key)
            require(value is None or 0 <= value <= 1, key, value, "is no share", "Set it in [0, 1], or to null.")
        require(
            self.stall_s is None or self.stall_s > 0, "stall_s", self.stall_s, "is no time", "Set seconds, or null."
        )


class Alerts:
    """Decides what to tell of records, and of their absence; each kind once in a while.

    Args:
        config: limits.
        clock: seconds that only grow.
    """

    def __init__(self, config: AlertConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self._told: dict[Kind, float] = {}
        self._last, self._longest = clock(), 0.0
        self._step = 0

    def of(self, record: Mapping[str, Value]) -> list[Alert]:
        """What a record gives reason to tell."""
        now = self._clock()
        self._longest, self._last, self._step = max(self._longest, now - self._last), now, step_of(record)
        return [alert for alert in self._found(record) if self.due(alert)]

    def silence(self) -> Alert | None:
        """What the time since the last record gives reason to tell."""
        silent_s, limit_s = self._clock() - self._last, self._config.stall_s
        if limit_s is None or silent_s < max(limit_s, 5 * self._longest):
            return None
        text = f"No record for {silent_s:.0f} s after step {self._step}; logs/ says what each rank was doing."
        alert = Alert("stall", "the run stalls", text)
        return alert if self.due(alert) else None

    def due(self, alert: Alert) -> bool:
        """Whether its kind has not been told of for a while; from now on it has."""
        now, told = self._clock(), self._told.get(alert.kind)
        if told is not None and now - told < self._config.every_s:
            return False
        self._told[alert.kind] = now
        return True

    def _found(self, record: Mapping[str, Value]) -> Iterator[Alert]:
        config, step = self._config, step_of(record)
        for key in ("train/loss", "eval/loss", "train/grad_norm"):
            value = record.get(key)
            if isinstance(value, float) and not math.isfinite(value):
                yield Alert("nan", "a number is none", f"{key} is {value} at step {step}.")
        if step <= config.warmup_steps:
            return
        entropy, drops = record.get("moe/load_entropy"), record.get("moe/drop_rate")
        if config.load_entropy is not None and isinstance(entropy, float) and entropy < config.load_entropy:
            text = f"moe/load_entropy is {entropy:.2f} at step {step}: few experts get most pairs. Balance harder."
            yield Alert("collapse", "the router collapses", text)
        if config.drop_rate is not None and isinstance(drops, float) and drops > config.drop_rate:
            text = f"moe/drop_rate is {drops:.0%} at step {step}. Balance harder, or raise moe.capacity.factor."
            yield Alert("drops", "many pairs are dropped", text)
