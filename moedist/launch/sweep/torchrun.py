"""``hydra/launcher=torchrun``: jobs on the ranks of this machine, one after the other or side by side."""

from __future__ import annotations

import dataclasses

from moedist.config import require
from moedist.launch.folder import claim_folder
from moedist.launch.outcome import launcher_log
from moedist.launch.saved import CONFIG
from moedist.launch.start import Launch
from moedist.launch.sweep.job import Job
from moedist.launch.sweep.machine import Machine, Share, this_machine
from moedist.launch.sweep.settings import SweepConfig
from moedist.train.status import Status


@dataclasses.dataclass(frozen=True)
class TorchrunConfig(SweepConfig):
    """Jobs on this machine.

    Attributes:
        ranks_per_job: ranks of every job, in place of ``launch.nproc``; as many jobs run side by side as there are GPUs
            for, or cores where ranks use none. None for one job at a time, each as its ``launch.nproc`` says.
    """

    ranks_per_job: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.ranks_per_job is None or self.ranks_per_job >= 1,
            "ranks_per_job",
            self.ranks_per_job,
            "is not a number of ranks",
            "Set 1 or more.",
        )

    def open(self) -> ThisMachine:
        """The place where jobs run."""
        return ThisMachine(this_machine(), self.ranks_per_job)


class ThisMachine:
    """Starts jobs below this process.

    Args:
        machine: to share out.
        ranks_per_job: None for one job at a time.
    """

    def __init__(self, machine: Machine, ranks_per_job: int | None):
        self._machine, self._ranks_per_job = machine, ranks_per_job
        self.overrides = [] if ranks_per_job is None else [f"launch.nproc={ranks_per_job}"]

    def start(self, job: Job) -> LocalJob | None:
        config = job.composed.config
        require(
            config.launch.nnodes == 1,
            "launch.nnodes",
            config.launch.nnodes,
            "is more than this machine",
            "Set it to 1, or sweep with hydra/launcher=slurm.",
        )
        if self._ranks_per_job is None:
            share = self._machine.take_all()
        else:
            share = self._machine.take(self._ranks_per_job, on_gpus=config.mesh.device != "cpu")
        if share is None:
            return None
        try:
            return LocalJob(job, self._machine, share)
        except BaseException:
            self._machine.give_back(share)
            raise


class LocalJob:
    """A job with ranks on this machine; rank 0 speaks to ``<run>/logs/console.log``.

    Attributes:
        log: the launcher's.
    """

    def __init__(self, job: Job, machine: Machine, share: Share):
        config = job.composed.config
        self._machine, self._share = machine, share
        self.log = launcher_log(job.run_dir, nnodes=1)
        threads = config.launch.threads or max(1, len(share.cores) // job.ranks.nproc)
        self._claim = claim_folder(config.run, job.composed.mapping)
        try:
            with open(self._claim.path / "logs" / "console.log", "a", encoding="utf-8") as console:
                self._launch = Launch(
                    dataclasses.replace(job.ranks, threads=threads),
                    config.launch,
                    self._claim.path,
                    ["moedist.train", str(self._claim.path / CONFIG)],
                    lock=self._claim.lock,
                    terminal=console,
                    environment=share.environment,
                    cores=share.cores,
                )
        except BaseException:
            self._claim.release()
            raise
        job.record.place = share.describe()

    def poll(self) -> Status | None:
        return self._launch.poll()

    def stop(self) -> None:
        self._launch.stop()

    def kill(self) -> None:
        self._launch.kill()

    def close(self) -> None:
        self._launch.close()
        self._claim.release()
        self._machine.give_back(self._share)
