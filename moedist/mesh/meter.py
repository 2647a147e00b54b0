"""What exchanges of rows cost this rank, while somebody measures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class ExchangeMeter:
    """Bytes and seconds of every all-to-all of this process between `measuring` and its end.

    Attributes:
        bytes_sent: to other ranks.
        bytes_arrived: from all ranks, this one included: rows for its experts, and results that come back to it.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self.bytes_sent, self.bytes_arrived = 0, 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """Time in exchanges, waiting for the slowest rank included. On CUDA ask once the device is through with them:
        the time is the stream's."""
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3

    @contextlib.contextmanager
    def exchange(self, bytes_sent: int, bytes_arrived: int) -> Iterator[None]:
        """Measures one exchange; never makes the host wait for a device."""
        self.bytes_sent += bytes_sent
        self.bytes_arrived += bytes_arrived
        if self._on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start


# Of the process and not of the thread: backward runs on threads of autograd's own.
_meter: ExchangeMeter | None = None


@contextlib.contextmanager
def measuring(meter: ExchangeMeter | None) -> Iterator[None]:
    """Gives every exchange inside to ``meter``; None for nobody."""
    global _meter
    before, _meter = _meter, meter
    try:
        yield
    finally:
        _meter = before


def current_meter() -> ExchangeMeter | None:
    """Who measures at this moment."""
    return _meter
