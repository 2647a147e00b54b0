"""What a configuration asks of this machine, and whether it has it."""

from __future__ import annotations

from typing import Any

from moedist.doctor.finding import Finding
from moedist.doctor.gpus import examine_gpus
from moedist.doctor.machine import Wanted, examine_machine
from moedist.launch.folder import choose_folder
from moedist.launch.start import Ranks
from moedist.mesh.mesh import choose_device
from moedist.train.config import RunConfig


def examine(config: RunConfig, ranks: Ranks) -> list[Finding]:
    """All checks that need no rank.

    Args:
        config: of the run that is planned.
        ranks: likewise.
    """
    wandb: list[Any] = [sink for sink in config.log.sinks.values() if sink.kind == "wandb"]
    wanted = Wanted(
        nproc=ranks.nproc,
        world_size=ranks.world_size,
        threads=ranks.threads,
        device=choose_device(config.mesh.device, 0, ranks.nproc).type,
        folder=choose_folder(config.run),
        rendezvous=config.launch.rendezvous if ranks.nnodes > 1 else None,
        wandb=wandb[0].mode if wandb else None,
    )
    return [*examine_machine(wanted), *examine_gpus(config.mesh.device, ranks.nproc)]
