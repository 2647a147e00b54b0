"""What a run logs and where it goes."""

from __future__ import annotations

import dataclasses

from moedist.config import Config, require
from moedist.log.sink.console import ConsoleConfig
from moedist.log.sink.contract import SinkConfig
from moedist.log.sink.jsonl import JsonlConfig
from moedist.log.sink.wandb import WandbConfig


def _default_sinks() -> dict[str, SinkConfig]:
    return {"console": ConsoleConfig(), "jsonl": JsonlConfig(), "wandb": WandbConfig()}


@dataclasses.dataclass(frozen=True)
class LogConfig(Config):
    """Metrics and their sinks.

    Attributes:
        dead_window: an expert is dead when no pair asked for it in this many last steps.
        max_expert_keys: bound on the number of per-expert scalar keys in trackers that keep one series per key;
            48 layers x 128 experts would be 6,144 per quantity. Histograms and the lists in ``metrics.jsonl`` always
            hold every expert.
        sinks: where numbers go, by any name; none of them can stop a run.
    """

    dead_window: int = 100
    max_expert_keys: int = 512
    sinks: dict[str, SinkConfig] = dataclasses.field(default_factory=_default_sinks)

    def __post_init__(self) -> None:
        require(self.dead_window >= 1, "dead_window", self.dead_window, "is not a number of steps", "Set 1 or more.")
        require(
            self.max_expert_keys >= 0,
            "max_expert_keys",
            self.max_expert_keys,
            "is negative",
            "Set it to 0 for no per-expert scalars, or to the number of keys that your tracker bears.",
        )
