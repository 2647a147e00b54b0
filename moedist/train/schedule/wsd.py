"""Warm-up, stable, decay (Hu et al. 2024, MiniCPM)."""

from __future__ import annotations

import dataclasses

from moedist.config import require
from moedist.train.schedule.contract import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class WSDConfig(ScheduleConfig):
    """The peak until the last part, then a straight line down to ``final_factor``.

    Attributes:
        decay_share: length of that part, as a share of the steps after the warm-up.
    """

    decay_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.decay_share <= 1, "decay_share", self.decay_share, "is no share of the run", "Set it in (0, 1]."
        )

    def after_warmup(self, step: int, num_steps: int) -> float:
        """See the contract."""
        decay_steps = self.decay_share * num_steps
        share = min(max(step - (num_steps - decay_steps), 0.0) / decay_steps, 1.0)
        return 1 - (1 - self.final_factor) * share
