"""Our launchers as Hydra knows them: it makes plug-ins from this namespace only.

Every Hydra program of the environment imports this file, so it needs nothing but Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepLauncher(Launcher):
    """Hands the batches that a sweeper asks for to the task function, whole (`moedist.launch.sweep.batch.Batches.run`).

    Its settings are for the sweep, which has read them (`moedist.launch.sweep.launchers`).
    """

    def __init__(self, **settings: Any):
        self._run_batch: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._run_batch = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self._run_batch is not None, "launched before it was set up"
        returned: Sequence[JobReturn] = self._run_batch(job_overrides)
        return returned
