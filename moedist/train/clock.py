"""Where the time of a step goes on this rank."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "compute", "optimizer", "other")
"""What a step consists of; exchanges lie within ``compute``."""
PART_OF = {
    "data": "data",
    "forward": "compute",
    "backward": "compute",
    "count": "compute",
    "optimizer": "optimizer",
}
"""The part that a phase belongs to, where it is not ``other``."""


class StepClock:
    """Adds up the time between marks by part: the host's on a CPU, the stream's on CUDA, where the host runs ahead.

    Time that the host waits for data is the host's everywhere, and known at once.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self._measured = False
        self.data_s = 0.0

    def begin(self, measured: bool) -> None:
        """A step begins; only a ``measured`` one tells its parts (`seconds`)."""
        self._marks, self._measured = [], measured
        self.enter("other")

    def enter(self, phase: str) -> None:
        """What comes now."""
        now = time.perf_counter()
        if self._marks and self._marks[-1][0] == "data":
            self.data_s += now - self._marks[-1][1]
        event = None
        if self._on_cuda and self._measured:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        if not self._measured:
            self._marks.clear()
        self._marks.append((PART_OF.get(phase, "other"), now, event))

    def seconds(self) -> dict[str, float] | None:
        """Seconds of the step that has just ended, by part; None where it was not measured. On CUDA this waits."""
        if not self._measured:
            return None
        found = dict.fromkeys(PARTS, 0.0)
        for (part, begin_s, begin), (_, end_s, end) in zip(self._marks, self._marks[1:], strict=False):
            if begin is not None and end is not None:
                end.synchronize()
                found[part] += begin.elapsed_time(end) / 1e3
            else:
                found[part] += end_s - begin_s
        return found
