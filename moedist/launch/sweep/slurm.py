"""``hydra/launcher=slurm``: each job is one of SLURM's, submitted with launch/slurm.sbatch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from moedist.config import ConfigError, require
from moedist.config.exit_codes import ExitCode
from moedist.launch.sweep.job import Job
from moedist.launch.sweep.settings import SweepConfig
from moedist.train.status import EXIT_CODES, Status, read_status

LOOK_S = 2.0
"""Seconds between two questions about one job."""
ANSWER_S = 60.0
"""Seconds that SLURM has for one answer."""
SILENCE_S = 600.0
"""Seconds without any answer after which a job is given up."""


@dataclasses.dataclass(frozen=True)
class SlurmConfig(SweepConfig):
    """Jobs of SLURM, as many at once as the sweeper asks for; SLURM decides when each begins.

    Attributes:
        script: what sbatch is given, from the working directory, which all nodes share.
        options: of sbatch (``{time: 4:00:00, gpus-per-node: 4}``); they win over the script's own. None for none.
    """

    script: str = "launch/slurm.sbatch"
    options: dict[str, str | int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.script), "script", self.script, "names no script", "Name one like launch/slurm.sbatch.")

    def open(self) -> Slurm:
        """The place where jobs run."""
        require(
            Path(self.script).is_file(),
            "hydra.launcher.script",
            self.script,
            "is no file here",
            "Start the sweep in the checkout, or name a copy of launch/slurm.sbatch.",
        )
        return Slurm(self.script, [f"--{name}={value}" for name, value in (self.options or {}).items()])


class Slurm:
    """Submits jobs."""

    # Where the ranks meet is said by the script; this lets several nodes be checked before a job has any.
    overrides = ("launch.rendezvous=slurm",)

    def __init__(self, script: str, options: Sequence[str]):
        self._script, self._options = script, options

    def start(self, job: Job) -> SlurmJob:
        launch = job.composed.config.launch
        require(
            launch.nproc is not None,
            "launch.nproc",
            None,
            "leaves open how many ranks a node of the cluster gets",
            "Set it to the number of GPUs of a node.",
        )
        found = re.fullmatch(r"SLURM job (\d+)", job.record.place)
        if found and _state(found[1]):  # its sweep was killed, and it goes on
            return SlurmJob(job, found[1], earlier=None)
        words = [text for text in job.overrides if not re.match(r"launch\.(nnodes|rendezvous)=", text)]
        command = ["sbatch", "--parsable", f"--job-name={job.run_dir.parent.name}-{job.run_dir.name}"]
        command += [f"--nodes={launch.nnodes}", f"--output={output_of(job)}", *self._options, self._script]
        said = _ask([*command, *words, f"run.dir={job.run_dir}"])
        if said.returncode != 0:
            raise ConfigError(
                "hydra.launcher", "slurm", f"could not submit ({said.stderr.strip()})", "Mend hydra.launcher.options."
            )
        job.record.place = f"SLURM job {said.stdout.strip().partition(';')[0]}"
        return SlurmJob(job, job.record.place.rpartition(" ")[2], earlier=read_status(job.run_dir))


class SlurmJob:
    """A job that has been submitted.

    Args:
        job: of the sweep.
        number: of the job in SLURM.
        earlier: the status that lay in the run folder before; it is not this job's.

    Attributes:
        log: what its script says.
    """

    def __init__(self, job: Job, number: str, earlier: Status | None):
        self.log = output_of(job)
        self._number, self._run_dir = number, job.run_dir
        self._earlier = earlier
        self._stopping = self._ended = False
        self._next_look, self._last_answer = 0.0, time.monotonic()

    def poll(self) -> Status | None:
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        state = _state(self._number)
        if state is not None:
            self._last_answer = now
        elif now - self._last_answer > SILENCE_S:
            return Status(
                "io", EXIT_CODES["io"], f"SLURM has not answered for {SILENCE_S:.0f} s about job {self._number}."
            )
        if state != "":
            return None
        self._ended = True
        status = read_status(self._run_dir)
        return status if status is not None and status != self._earlier else self._without_a_word()

    def stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        # The script would have it come back after it has saved.
        _ask(["scontrol", "update", f"JobId={self._number}", "Requeue=0"])
        began = _state(self._number) not in ("PENDING", "CONFIGURING")
        _ask(["scancel", *(["--signal=USR1", "--batch"] if began else []), self._number])

    def kill(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._ended:
            _ask(["scancel", self._number])

    def _without_a_word(self) -> Status:
        """How a job ended whose ranks wrote no status."""
        if self._stopping:
            return Status(
                "preempted", EXIT_CODES["preempted"], "Cancelled before the first step: there was nothing to save."
            )
        fields = dict(re.findall(r"(JobState|ExitCode)=(\S+)", _ask(["scontrol", "show", "job", self._number]).stdout))
        state, code = fields.get("JobState", "gone"), int(fields.get("ExitCode", "0").partition(":")[0])
        message = f"SLURM job {self._number} ended ({state}) with exit code {code}, and its ranks said nothing."
        return Status("config" if code == ExitCode.CONFIG else "bug", code or EXIT_CODES["bug"], message)


def output_of(job: Job) -> Path:
    """Where a job's script writes: beside its run folder, which rank 0 makes."""
    return job.run_dir.with_name(f"{job.run_dir.name}.out")


def _state(number: str) -> str | None:
    """The state of a job that waits or runs; empty once it has ended; None without an answer."""
    said = _ask(["squeue", "--noheader", f"--jobs={number}", "--format=%T"])
    if said.returncode == 0:
        return said.stdout.strip()
    return "" if "Invalid job id" in said.stderr else None


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        # In a session of its own: a terminal's Ctrl-C is for the sweep.
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, start_new_session=True)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {ANSWER_S:.0f} s")
