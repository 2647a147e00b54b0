"""Being told to stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers send before they take a node away (SIGTERM, SIGUSR1), and Ctrl-C."""


class StopRequest:
    """Notes the signals that ask the process to stop, and does nothing else about them.

    A handler runs between any two lines of Python, also in the middle of a save or of a collective that the other
    ranks wait in; so it only notes, and the loop asks once per step, where all ranks agree to save and leave. Further
    signals change nothing: whoever loses patience sends SIGKILL, which a save survives.

        with StopRequest() as stop:
            while not stop.requested: ...

    Enter it in the main thread. Leaving it restores what was there before.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come on this rank; the others may know nothing of it."""
        return self.first is not None

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not set from Python and cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
