"""The cores and GPUs of this machine, shared out to jobs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Share:
    """What one job may use.

    Attributes:
        cores: numbers of CPU cores.
        gpus: as CUDA_VISIBLE_DEVICES names them; none where ranks run on the CPU.
    """

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that keep the ranks to it."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}

    def describe(self) -> str:
        """For people."""
        cores = f"cores {','.join(map(str, self.cores))}"
        return f"GPUs {','.join(self.gpus)}, {cores}" if self.gpus else cores


class Machine:
    """Hands out disjoint shares.

    Args:
        cores: that this process may use.
        gpus: that it sees.
    """

    def __init__(self, cores: Sequence[int], gpus: Sequence[str] = ()):
        self._cores, self._gpus = tuple(cores), tuple(gpus)
        self._taken: list[Share] = []

    def take(self, num_ranks: int, *, on_gpus: bool) -> Share | None:
        """A share for ranks that each want a core, or where ``on_gpus`` a GPU if there are any; None where too much is
        taken.

        A job gets the same part of the cores whatever else runs: as many as if the machine were full of its like. One
        that wants more than there is gets all of it, alone.
        """
        num_visible = len(self._gpus) if on_gpus else 0
        side_by_side = max(1, (num_visible or len(self._cores)) // num_ranks)
        num_cores, num_gpus = max(1, len(self._cores) // side_by_side), min(num_ranks, num_visible)
        cores = [core for core in self._cores if not any(core in share.cores for share in self._taken)]
        gpus = [gpu for gpu in self._gpus if not any(gpu in share.gpus for share in self._taken)]
        if len(cores) < num_cores or len(gpus) < num_gpus:
            return None
        self._taken.append(Share(tuple(cores[:num_cores]), tuple(gpus[:num_gpus])))
        return self._taken[-1]

    def take_all(self) -> Share | None:
        """Everything; None where any of it is taken."""
        if self._taken:
            return None
        self._taken.append(Share(self._cores, self._gpus))
        return self._taken[-1]

    def give_back(self, share: Share) -> None:
        """Makes room."""
        self._taken.remove(share)


def this_machine() -> Machine:
    """What this process may use."""
    return Machine(sorted(os.sched_getaffinity(0)), visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]
