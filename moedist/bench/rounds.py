"""Times that can be compared on a machine that others use too: all contenders in every round, medians of ratios."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from moedist.mesh import Mesh
from moedist.mesh.collectives import all_max, barrier

QUOTABLE = 0.2
"""Largest spread of a figure that means something."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A figure found many times.

    Attributes:
        median: of all.
        spread: distance of the quartiles, as a share of the median.
    """

    median: float
    spread: float

    @property
    def quotable(self) -> bool:
        """Whether the machine was quiet enough."""
        return self.spread <= QUOTABLE


def sample(values: Sequence[float]) -> Sample:
    """Of at least two positive values.

    >>> sample([1.0, 2.0, 3.0])
    Sample(median=2.0, spread=1.0)
    """
    low, middle, high = statistics.quantiles(values, n=4)
    return Sample(middle, (high - low) / middle)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Sample:
    """Ours over theirs, round by round: what slows the machine for a while slows both.

    >>> ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0])
    Sample(median=0.5, spread=0.0)
    """
    return sample([a / b for a, b in zip(ours, theirs, strict=True)])


def take_turns(
    work: Mapping[str, Callable[[], None]], rounds: int, mesh: Mesh, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, on the slowest rank; all ranks begin together.

    The order turns by one from round to round, so that none always comes after the same one.

    Args:
        work: by name.
        rounds: that count.
        mesh: of the ranks.
        warm_up: rounds before, which do not.
    """
    names, seconds = list(work), {name: list[float]() for name in work}
    for turn in range(warm_up + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            barrier(mesh.dp, mesh.device)
            begin = time.perf_counter()
            work[name]()
            if mesh.device.type == "cuda":
                torch.cuda.synchronize(mesh.device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    slowest = all_max(torch.tensor([seconds[name] for name in names], dtype=torch.float64, device=mesh.device), mesh.dp)
    return dict(zip(names, slowest.tolist(), strict=True))
