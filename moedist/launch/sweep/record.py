"""What has become of a sweep's jobs: ``<sweep>/sweep.json``, for the next start, for reports and for people."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode
from moedist.launch.folder import refused
from moedist.log.sink.jsonl import json_safe

SWEEP = "sweep.json"

State = Literal["WAITING", "RUNNING", "COMPLETED", "PRUNED", "FAILED", "STOPPED"]
FINISHED: tuple[State, ...] = ("COMPLETED", "PRUNED")
"""Jobs that a sweep which goes on does not run again."""
LEFT: tuple[State, ...] = ("WAITING", "RUNNING", "STOPPED")
"""Jobs that have not come to an end of their own."""


@dataclasses.dataclass
class JobRecord:
    """One job.

    Attributes:
        number: counts the jobs of the sweep from 0; names its folder.
        overrides: what it was given beside the overrides that all jobs have.
        config_hash: of its composed configuration (`hash_config`).
        run_dir: its run folder, below the sweep's.
        state: WAITING, RUNNING, COMPLETED, PRUNED (ended early by the median stop), FAILED, or STOPPED with the sweep.
        exit_code: as of `moedist train`; None before it has ended.
        message: how it ended.
        log: the rank's or the launcher's log to look at, where it failed.
        values: its objectives; None where it has not measured them.
        metrics: the last value of each metric of the objectives.
        by_step: the first objective at each step that measured it.
        place: what it ran on, in words.
        started, ended: ISO 8601 with the zone.
    """

    number: int
    overrides: list[str]
    config_hash: str
    run_dir: str
    state: State = "WAITING"
    exit_code: int | None = None
    message: str = ""
    log: str | None = None
    values: list[float] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    by_step: dict[int, float] = dataclasses.field(default_factory=dict)
    place: str = ""
    started: str | None = None
    ended: str | None = None

    def describe_failure(self) -> str:
        """One line."""
        where = "" if self.log is None else f" See {self.log}."
        return f"{self.run_dir}: FAILED with exit code {self.exit_code}: {self.message.rstrip('.')}.{where}"

    @property
    def seconds(self) -> float | None:
        """How long its last start ran."""
        if self.started is None or self.ended is None:
            return None
        started, ended = map(datetime.datetime.fromisoformat, (self.started, self.ended))
        return (ended - started).total_seconds()


@dataclasses.dataclass
class SweepRecord:
    """All jobs of a sweep, kept in its folder.

    Attributes:
        folder: of the sweep.
        overrides: of its command.
        objectives: each as weights by metric.
        jobs: by number.
        asked: numbers of the jobs that this start was asked for.
        cut_short: whether the sweeper failed before it was content.
    """

    folder: Path
    overrides: list[str]
    objectives: list[dict[str, float]]
    jobs: list[JobRecord] = dataclasses.field(default_factory=list)
    asked: set[int] = dataclasses.field(default_factory=set)
    cut_short: bool = False

    @classmethod
    def read(cls, folder: Path) -> SweepRecord | None:
        """The record in a folder; None where there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        path = folder / SWEEP
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            jobs = [_read_job(job) for job in fields["jobs"]]
            return cls(folder, fields["overrides"], fields["objectives"], jobs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "run.dir", str(folder), f"holds a {SWEEP} that cannot be read ({error})", "Name another run.dir."
            ) from error

    def write(self) -> None:
        """Replaces the file, whole or not at all.

        Raises:
            FolderError: it cannot be written.
        """
        draft = self.folder / f".{SWEEP}.{os.getpid()}"
        try:
            draft.write_text(json.dumps(self.as_mapping(), indent=2) + "\n", encoding="utf-8")
            draft.replace(self.path)
        except OSError as error:
            raise refused(self.folder, error) from error
        finally:
            draft.unlink(missing_ok=True)

    def as_mapping(self) -> dict[str, Any]:
        """All of it for JSON; NaN and infinities are words."""
        fields = {
            "sweep_dir": str(self.folder),
            "overrides": self.overrides,
            "objectives": self.objectives,
            "exit_code": self.exit_code,
            "jobs": [dataclasses.asdict(job) for job in self.jobs],
        }
        safe: dict[str, Any] = json_safe(fields)
        return safe

    def find(self, config_hash: str) -> JobRecord | None:
        """The job with this configuration."""
        return next((job for job in self.jobs if job.config_hash == config_hash), None)

    def add(self, overrides: Sequence[str], config_hash: str) -> JobRecord:
        """A new job, with the next number and folder."""
        number = len(self.jobs)
        self.jobs.append(JobRecord(number, list(overrides), config_hash, f"{number:03d}"))
        return self.jobs[-1]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / SWEEP

    @property
    def exit_code(self) -> int:
        """Of this start: 0 where every job that was asked for completed or was pruned, 75 where one is left to do,
        else the highest of the failed jobs and of a sweeper that failed (2).
        """
        asked = [job for job in self.jobs if job.number in self.asked]
        failed = [job.exit_code or ExitCode.RANK_FAILED for job in asked if job.state == "FAILED"]
        failed += [ExitCode.CONFIG] if self.cut_short else []
        left = any(job.state in LEFT for job in asked)
        return int(ExitCode.PREEMPTED if left else max(failed, default=ExitCode.DONE))

    @property
    def best(self) -> JobRecord | None:
        """The completed job with the lowest objective, where there is one objective."""
        measured = [job for job in self.jobs if job.state == "COMPLETED" and job.values and len(job.values) == 1]
        return min(measured, key=lambda job: (job.values or [0.0])[0], default=None)

    def table(self) -> Iterator[str]:
        """The jobs for people, a line each."""
        keys = list(dict.fromkeys(key for term in self.objectives for key in term))
        weighted = any(term != {key: 1.0} for term in self.objectives for key in term)
        names = [_name(term) for term in self.objectives] if weighted else []
        rows = [("job", "state", *keys, *names, "seconds", "overrides")]
        for job in self.jobs:
            metrics = [_number(job.metrics.get(key)) for key in keys]
            values = [""] * len(names) if job.values is None else [_number(value) for value in job.values if names]
            seconds = "" if job.seconds is None else f"{job.seconds:.0f}"
            rows.append((job.run_dir, job.state, *metrics, *values, seconds, " ".join(job.overrides)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            yield "  ".join(cells).rstrip()
        for job in self.jobs:
            if job.state == "FAILED":
                yield job.describe_failure()
        if self.best is not None and self.best.values is not None:
            yield f"best: {self.best.run_dir}, {_name(self.objectives[0])} = {_number(self.best.values[0])}"


def hash_config(mapping: Mapping[str, Any]) -> str:
    """What a job is known by: its configuration as plain mappings, without ``run``, which says where it lies."""
    kept = {key: value for key, value in mapping.items() if key != "run"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """The time, ISO 8601 with the zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _read_job(fields: Mapping[str, Any]) -> JobRecord:
    job = JobRecord(**fields)
    job.by_step = {int(step): float(value) for step, value in job.by_step.items()}  # NaN and infinities are words
    job.metrics = {key: float(value) for key, value in job.metrics.items()}
    job.values = None if job.values is None else [float(value) for value in job.values]
    return job


def _name(term: Mapping[str, float]) -> str:
    return " + ".join(key if weight == 1.0 else f"{weight:g} {key}" for key, weight in term.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
