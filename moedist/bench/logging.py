"""What all metrics of a step cost: steps with a record and steps without take turns in one process."""

from __future__ import annotations

import dataclasses
import io
import statistics
import time
from pathlib import Path

import torch

from moedist.bench.rounds import QUOTABLE
from moedist.config import to_mapping
from moedist.data.check import open_data
from moedist.log.run_log import RunLog
from moedist.log.sink.contract import RunInfo
from moedist.mesh import Axis, Mesh
from moedist.train.build import build_model
from moedist.train.checkpoint import CheckpointStore
from moedist.train.config import RunConfig
from moedist.train.signals import StopRequest
from moedist.train.trainer import Progress, Trainer
from moedist.train.watchdog import Watchdog

WARM_UP = 3
"""Pairs of steps that are not counted."""


@dataclasses.dataclass(frozen=True)
class LoggingCost:
    """What a record of every step costs.

    Attributes:
        pairs: pairs of one step with and one step without a record, next to each other.
        plain_s: median seconds of a step without.
        cost: median over pairs of (with / without) - 1.
        spread: distance of the quartiles of these ratios: the noise that the cost is found in.
        ranks, device: where.
    """

    pairs: int
    plain_s: float
    cost: float
    spread: float
    ranks: int
    device: str

    @property
    def quotable(self) -> bool:
        """Whether the machine was quiet enough."""
        return self.spread <= QUOTABLE


def measure_logging(config: RunConfig, folder: Path, pairs: int, device: torch.device) -> LoggingCost:
    """Trains ``2 * pairs`` steps in this process, every second one measured in full and sent to all sinks.

    Which of a pair comes first takes turns, so that a machine that slows down favours neither. Sinks that work in the
    background do so in both.

    Args:
        config: a run's; its experts stay in one process.
        folder: for what sinks write.
        pairs: how many.
        device: of the process.
    """
    mesh, source = Mesh.alone(device), open_data(config.data)
    spread = build_model(config, source.vocab_size, mesh)
    store = CheckpointStore(folder / "checkpoints", Axis("slow"))
    with StopRequest() as stop, Watchdog(folder / "logs", 0, config.mesh.timeout_s) as watchdog:
        trainer = Trainer(config, mesh, source, spread, store, stop, watchdog, Progress("logging0", "logging0"), {})
        trainer.model.train()
        trainer.measures.measure_peak()
        log, loader = open_log(config, folder, device), trainer.loader()

        def step(recorded: bool) -> float:
            start = time.perf_counter()
            with trainer.measures.step(recorded):
                trainer.take_step(loader)
            if recorded:
                trainer.record(log, evaluated=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        plain, ratios = [], []
        for pair in range(pairs + WARM_UP):
            order = (True, False) if pair % 2 else (False, True)
            seconds = {recorded: step(recorded) for recorded in order}
            if pair >= WARM_UP:
                plain.append(seconds[False])
                ratios.append(seconds[True] / seconds[False])
        log.close("done")
        trainer.engine.close()
    low, _, high = statistics.quantiles(ratios, n=4)
    return LoggingCost(
        pairs=pairs,
        plain_s=statistics.median(plain),
        cost=statistics.median(ratios) - 1,
        spread=high - low,
        ranks=mesh.dp.size,
        device=device.type,
    )


def open_log(config: RunConfig, folder: Path, device: torch.device) -> RunLog:
    """The run's own sinks; what they tell people goes nowhere."""
    info = RunInfo(
        directory=folder,
        name="bench",
        run_id="logging0",
        group_id="logging0",
        resumed_step=0,
        config=to_mapping(config),
        environment={},
        num_steps=config.train.steps,
        device=device.type,
        max_scalar_keys=config.log.max_scalar_keys,
        terminal=io.StringIO(),
    )
    return RunLog(config.log, info, rank=0)
