"""One job of a sweep, and what runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moedist.launch.compose import Composed
from moedist.launch.start import Ranks
from moedist.launch.sweep.objective import Measured
from moedist.launch.sweep.record import JobRecord
from moedist.train.status import Status


@dataclasses.dataclass
class Job:
    """A job that may start.

    Attributes:
        record: what the sweep's folder says of it.
        composed: its configuration, checked; ``run.dir`` is its folder.
        overrides: all that made it, without ``run.dir``.
        ranks: of it.
        measured: its objectives so far.
        pruned: why it was told to stop; empty for a job that goes on.
    """

    record: JobRecord
    composed: Composed
    overrides: Sequence[str]
    ranks: Ranks
    measured: Measured
    pruned: str = ""

    @property
    def run_dir(self) -> Path:
        """Its folder."""
        folder = self.composed.config.run.dir
        assert folder is not None, "a job without a folder"
        return Path(folder)


class RunningJob(Protocol):
    """A job that has been started.

    Attributes:
        log: where to look when no rank is to blame.
    """

    log: Path

    def poll(self) -> Status | None:
        """How it ended; None while it runs."""

    def stop(self) -> None:
        """Asks its ranks to save and leave."""

    def kill(self) -> None:
        """Ends them as they stand, at the next `poll`."""

    def close(self) -> None:
        """Gives back what it held; nothing of it runs on."""


class Place(Protocol):
    """Where jobs run.

    Attributes:
        overrides: what it sets in every job's configuration.
    """

    @property
    def overrides(self) -> Sequence[str]: ...

    def start(self, job: Job) -> RunningJob | None:
        """Starts a job; None where there is no room until another has ended.

        Raises:
            ConfigError: its folder is in use or cannot be written.
            OSError: the environment refuses.
        """
