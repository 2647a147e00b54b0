"""Cosine decay (Loshchilov and Hutter 2017)."""

from __future__ import annotations

import dataclasses
import math

from moedist.train.schedule.contract import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class CosineConfig(ScheduleConfig):
    """Half a cosine from 1 down to ``final_factor`` at the last step."""

    def after_warmup(self, step: int, num_steps: int) -> float:
        """See the contract."""
        share = min(step / num_steps, 1.0)
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * share))
