"""How good a job is, from the metrics in its run folder, and whether it may go on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Measured:
    """What a job has logged of its objectives so far; `read` looks for more.

    Attributes:
        latest: the last value of each metric of the objectives.
        by_step: the first objective at each step that logged all of its metrics.
    """

    def __init__(self, path: Path, terms: Sequence[Mapping[str, float]]):
        self._path, self._terms = path, terms
        self._offset = 0
        self.latest: dict[str, float] = {}
        self.by_step: dict[int, float] = {}

    def read(self) -> bool:
        """Reads the rows that were added since the last call; whether one has measured the first objective."""
        try:
            if self._path.stat().st_size <= self._offset:
                return False
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return False  # the job has not come so far
        self._offset += len(whole) + len(newline)
        return any([self._note(json.loads(line)) for line in whole.splitlines() if line.strip()])

    def _note(self, row: Mapping[str, Any]) -> bool:
        for key in {key for term in self._terms for key in term}:
            if key in row:
                self.latest[key] = float(row[key])  # NaN and infinities are words there
        if not all(key in row for key in self._terms[0]):
            return False
        self.by_step[int(row["train/step"])] = weigh(self._terms[0], self.latest)
        return True

    @property
    def values(self) -> list[float] | None:
        """The objectives from the last value of each metric; None while one is missing."""
        if any(key not in self.latest for term in self._terms for key in term):
            return None
        return [weigh(term, self.latest) for term in self._terms]


def weigh(term: Mapping[str, float], metrics: Mapping[str, float]) -> float:
    """One objective: the weighted sum of its metrics."""
    return sum(weight * metrics[key] for key, weight in term.items())


def median_of_others(
    by_step: Mapping[int, float], others: Iterable[Mapping[int, float]], after_jobs: int, after_steps: int
) -> float | None:
    """The median of what completed jobs had measured at a job's newest step; None where it is too early to judge.

    Args:
        by_step: the job's objective by step.
        others: those of completed jobs.
        after_jobs: how many of them must have a value at the step.
        after_steps: steps that are too early.
    """
    step = max(by_step)
    peers = [other[step] for other in others if step in other and not math.isnan(other[step])]
    return statistics.median(peers) if step > after_steps and len(peers) >= after_jobs else None


def is_above(by_step: Mapping[int, float], median: float) -> bool:
    """Whether the best that a job has measured is above the median: the median stop of Golovin et al., "Google Vizier",
    2017.
    """
    return all(math.isnan(value) or value > median for value in by_step.values())
