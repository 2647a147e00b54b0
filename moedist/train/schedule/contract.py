"""How learning rates follow the step."""

from __future__ import annotations

import dataclasses

from moedist.config import Choice, require


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Choice, path="train.schedule"):
    """A factor on every peak learning rate; a pure function of the step, so a resume needs no state of it.

    Attributes:
        warmup_steps: steps of linear growth from 0; the last of them is at the peak.
        final_factor: factor at the last step.
    """

    warmup_steps: int = 0
    final_factor: float = 0.1

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "is negative", "Set it to 0 or more.")
        require(
            0 <= self.final_factor <= 1,
            "final_factor",
            self.final_factor,
            "is no share of the peak learning rate",
            "Set it between 0 and 1.",
        )

    def factor(self, step: int, num_steps: int) -> float:
        """The factor of step ``step`` (from 1) of ``num_steps``."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return self.after_warmup(step - self.warmup_steps, max(num_steps - self.warmup_steps, 1))

    def after_warmup(self, step: int, num_steps: int) -> float:
        """The factor of step ``step`` (from 1) of the ``num_steps`` that follow the warm-up."""
        raise NotImplementedError
