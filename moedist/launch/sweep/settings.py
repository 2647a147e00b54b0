"""What a sweep is told on the command line, below ``hydra.launcher``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moedist.config import Config, require

if TYPE_CHECKING:
    from moedist.launch.sweep.job import Place

Term = str | dict[str, float]
"""One objective: a metric, or metrics and their weights."""


@dataclasses.dataclass(frozen=True)
class SweepConfig(Config):
    """What every launcher knows of a sweep.

    Attributes:
        objective: what a sweeper is given for a job, lower is better: a key of ``metrics.jsonl``, weights by key
            (``{eval/loss: 1, moe/max_vio: 0.1}``), or a list of these, one for each direction of the sweeper. The
            last values that a job logs count.
        prune_after_jobs: median stop: a job ends early, as PRUNED, when the best objective that it has measured so far
            is above the median of what the completed jobs had measured at the same step, once so many have; None for
            never.
        prune_after_steps: steps that every job is given before it may be pruned.
    """

    objective: Term | tuple[Term, ...] = "eval/loss"
    prune_after_jobs: int | None = None
    prune_after_steps: int = 0

    def __post_init__(self) -> None:
        require(
            bool(self.terms) and all(key for term in self.terms for key in term or [""]),
            "objective",
            self.objective,
            "names no metric",
            "Name a key of metrics.jsonl, such as eval/loss.",
        )
        require(
            self.prune_after_jobs is None or self.prune_after_jobs >= 1,
            "prune_after_jobs",
            self.prune_after_jobs,
            "leaves no job to compare with",
            "Set 1 or more, or null for no pruning.",
        )
        require(
            self.prune_after_steps >= 0, "prune_after_steps", self.prune_after_steps, "is negative", "Set 0 or more."
        )
        require(
            self.prune_after_jobs is None or len(self.terms) == 1,
            "prune_after_jobs",
            self.prune_after_jobs,
            f"cannot judge jobs by {len(self.terms)} objectives",
            "Set it to null, or weigh the objectives into one.",
        )

    @property
    def terms(self) -> tuple[dict[str, float], ...]:
        """Each objective as weights by metric."""
        listed = self.objective if isinstance(self.objective, tuple) else (self.objective,)
        return tuple({term: 1.0} if isinstance(term, str) else dict(term) for term in listed)

    def open(self) -> Place:
        """The place where jobs run."""
        raise NotImplementedError
