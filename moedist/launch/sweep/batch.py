"""Runs the jobs that a sweeper asks for: checks all, starts as many as there is room for, watches, prunes."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus

from moedist.config import ConfigError, ConfigErrors, require, to_mapping
from moedist.config.exit_codes import ExitCode
from moedist.launch.compose import Composed, compose
from moedist.launch.node_groups import follow_nodes
from moedist.launch.outcome import rank_log
from moedist.launch.saved import CONFIG
from moedist.launch.start import POLL_S, StopSignals, plan_ranks
from moedist.launch.sweep.job import Job, Place, RunningJob
from moedist.launch.sweep.objective import Measured, is_above, median_of_others
from moedist.launch.sweep.record import FINISHED, LEFT, JobRecord, SweepRecord, hash_config, now
from moedist.launch.sweep.settings import SweepConfig
from moedist.launch.validate import validate
from moedist.log.sink.jsonl import JsonlConfig
from moedist.train.config import RunConfig
from moedist.train.status import Status


class SweepStopped(Exception):
    """The sweep was told to stop; its jobs have been."""


class JobFailed(Exception):
    """What a sweeper that can bear it is given for a failed job."""


@dataclasses.dataclass
class Batches:
    """Runs batch after batch.

    Attributes:
        record: of the sweep; written at each change.
        settings: of the launcher.
        place: where jobs run.
        fixed: overrides that all jobs have, as the user wrote them.
        known: those as sweepers give them to each job.
        signals: what asks this process to stop.
        say: tells people.
        judges: whether somebody needs the jobs' objectives.
        bears_failures: whether the sweeper goes on when a job raises.
    """

    record: SweepRecord
    settings: SweepConfig
    place: Place
    fixed: Sequence[str]
    known: Collection[str]
    signals: StopSignals
    say: Callable[[str], None]
    judges: bool
    bears_failures: bool

    def run(self, batch: Sequence[Sequence[str]]) -> list[JobReturn]:
        """Runs the jobs of a batch that have not run yet; returns every one's objectives.

        Args:
            batch: for each job, its overrides; the fixed ones, as in ``known``, may be among them.

        Raises:
            SweepStopped: a signal came, and a job is left to do.
        """
        records: list[JobRecord] = []
        jobs: dict[int, Job] = {}
        for overrides in batch:
            record, job = self._admit([text for text in overrides if text not in self.known])
            records.append(record)
            if job is not None:
                jobs.setdefault(record.number, job)  # a sweeper may ask for one job twice
        self.record.write()
        self._run_all(list(jobs.values()))
        if self.signals.count and any(record.state in LEFT for record in records):
            raise SweepStopped
        return [self._result(record) for record in records]

    def _admit(self, overrides: Sequence[str]) -> tuple[JobRecord, Job | None]:
        """The record of these overrides' job, and what to run of it: nothing where it has been done or cannot be."""
        composed, error = self._compose(overrides)
        config_hash = hash_config(composed.mapping if composed is not None else {"overrides": list(overrides)})
        record = self.record.find(config_hash) or self.record.add(overrides, config_hash)
        self.record.asked.add(record.number)
        if record.state in FINISHED:
            self.say(f"job {record.run_dir}: {record.state} at an earlier start, not run again")
            return record, None
        if composed is not None:
            try:
                return record, self._prepare(composed, record, overrides)
            except ConfigError as refused:
                error = refused
        assert error is not None
        self._fail(record, str(error), _exit_code(error))
        return record, None

    def _compose(self, overrides: Sequence[str]) -> tuple[Composed | None, ConfigError | None]:
        try:
            return compose([*self.fixed, *overrides, *self.place.overrides]), None
        except ConfigError as error:
            return None, error

    def _prepare(self, composed: Composed, record: JobRecord, overrides: Sequence[str]) -> Job:
        """Gives a configuration its folder and checks it, as `moedist train` does.

        Raises:
            ConfigErrors: all that is wrong with it.
        """
        folder = self.record.folder / record.run_dir
        resume = "auto" if (folder / CONFIG).is_file() else "never"
        run = dataclasses.replace(composed.config.run, dir=str(folder), resume=resume)
        composed = Composed(dataclasses.replace(composed.config, run=run), {**composed.mapping, "run": to_mapping(run)})
        ranks = plan_ranks(composed.config.launch, composed.config.mesh.device)
        composed = follow_nodes(composed, ranks.nproc)
        if self.judges:
            check_measures(self.settings, composed.config)
        validate(composed.config, composed.mapping, ranks.world_size)
        record.state = "WAITING"
        measured = Measured(folder / "metrics.jsonl", self.settings.terms)
        return Job(record, composed, [*self.fixed, *overrides], ranks, measured)

    def _run_all(self, jobs: Sequence[Job]) -> None:
        """Returns when all have ended, or have been stopped by a signal; none runs on."""
        waiting, running = collections.deque(jobs), list[tuple[Job, RunningJob]]()
        try:
            while waiting or running:
                if self.signals.count:
                    waiting.clear()
                while waiting and self._start(waiting[0], running):
                    waiting.popleft()
                for pair in list(running):
                    if self._watch(*pair):
                        running.remove(pair)
                time.sleep(POLL_S)
        finally:
            for job, started in running:  # only an error of this program's leaves any
                started.close()
                job.record.state = "STOPPED"
            self.record.write()

    def _start(self, job: Job, running: list[tuple[Job, RunningJob]]) -> bool:
        """Starts a job; False where there is no room yet."""
        try:
            started = self.place.start(job)
        except (ConfigError, OSError) as error:
            self._fail(job.record, str(error), _exit_code(error))
            return True
        if started is None:
            return False
        record = job.record
        record.state, record.started, record.ended, record.exit_code, record.log = "RUNNING", now(), None, None, None
        record.message = ""
        running.append((job, started))
        self.record.write()
        self.say(f"job {record.run_dir}: started on {record.place}: {' '.join(record.overrides)}")
        return True

    def _watch(self, job: Job, started: RunningJob) -> bool:
        """Looks at a job that was started; whether it has ended."""
        if self.signals.interrupts >= 2:
            started.kill()
        elif self.signals.count:
            started.stop()
        status = started.poll()
        measured = job.measured.read()
        if status is None:
            if measured and not job.pruned and (why := self._why_prune(job)):
                job.pruned = why
                started.stop()
            return False
        started.close()
        self._conclude(job, status, started.log)
        return True

    def _why_prune(self, job: Job) -> str:
        """Why a job may not go on; empty where it may."""
        after_jobs = self.settings.prune_after_jobs
        if after_jobs is None:
            return ""
        others = [other.by_step for other in self.record.jobs if other.state == "COMPLETED"]
        median = median_of_others(job.measured.by_step, others, after_jobs, self.settings.prune_after_steps)
        if median is None or not is_above(job.measured.by_step, median):
            return ""
        step = max(job.measured.by_step)
        return f"Hopeless at step {step}: {min(job.measured.by_step.values()):.5g}, and the median is {median:.5g}."

    def _conclude(self, job: Job, status: Status, launchers: Path) -> None:
        """Notes how a job ended; ``launchers`` is the log to look at when no rank is to blame."""
        record, measured = job.record, job.measured
        record.metrics, record.by_step, record.values = measured.latest, measured.by_step, measured.values
        record.ended, record.exit_code, record.message = now(), status.exit_code, status.message
        if status.reason == "done":
            record.state = "COMPLETED"
        elif status.reason == "preempted" and job.pruned:
            record.state, record.exit_code, record.message = "PRUNED", int(ExitCode.DONE), job.pruned
        elif status.reason == "preempted":
            record.state = "STOPPED"
        else:
            log = launchers if status.rank is None else rank_log(job.run_dir, status.rank)
            self._fail(record, status.message, status.exit_code, str(log))
            return
        self.record.write()
        metrics = "  ".join(f"{key} {value:.5g}" for key, value in record.metrics.items())
        self.say(f"job {record.run_dir}: {record.state}  {metrics}")

    def _fail(self, record: JobRecord, message: str, exit_code: int, log: str | None = None) -> None:
        record.state, record.exit_code, record.log, record.values = "FAILED", exit_code, log, None
        record.message = " ".join(message.splitlines())
        self.record.write()
        self.say(f"job {record.describe_failure()}")

    def _result(self, record: JobRecord) -> JobReturn:
        """What the sweeper hears: one number, or a tuple of them; of a failed job an error, if it can bear one."""
        returned = JobReturn(overrides=record.overrides, status=JobStatus.COMPLETED)
        values = record.values or [math.nan] * len(self.settings.terms)
        returned.return_value = values[0] if len(values) == 1 else tuple(values)
        if record.state == "FAILED" and self.bears_failures:
            returned.status = JobStatus.FAILED
            returned.return_value = JobFailed(f"job {record.run_dir}: {record.message}")
        return returned


def check_measures(settings: SweepConfig, config: RunConfig) -> None:
    """Raises `ConfigError` where a job would not measure what the sweep needs to know."""
    require(
        any(isinstance(sink, JsonlConfig) for sink in config.log.sinks.values()),
        "log.sinks",
        list(config.log.sinks),
        "keeps no metrics.jsonl, from which the sweep takes its objective",
        "Add jsonl to log/sink.",
    )
    measures = any(key.startswith("eval/") for term in settings.terms for key in term)
    require(
        not measures or config.train.eval_every is not None,
        "train.eval_every",
        None,
        f"measures no hydra.launcher.objective = {settings.objective!r}",
        "Set train.eval_every to a number of steps, or hydra.launcher.objective to a metric of training.",
    )


def _exit_code(error: ConfigError | OSError) -> int:
    if isinstance(error, OSError):
        return int(ExitCode.ENVIRONMENT)
    errors = error.errors if isinstance(error, ConfigErrors) else (error,)
    return int(max(single.exit_code for single in errors))
