"""What ``hydra/launcher`` may choose, and what each choice may be told."""

from __future__ import annotations

from moedist.launch.compose import default_mapping, register
from moedist.launch.sweep.settings import SweepConfig
from moedist.launch.sweep.slurm import SlurmConfig
from moedist.launch.sweep.torchrun import TorchrunConfig

PLUGIN = "hydra_plugins.moedist_launchers.SweepLauncher"

LAUNCHERS: dict[str, type[SweepConfig]] = {"torchrun": TorchrunConfig, "slurm": SlurmConfig}


def register_launchers() -> None:
    """Makes the launchers known to Hydra, each with its settings' defaults."""
    for name, settings in LAUNCHERS.items():
        register("hydra/launcher", name, {"_target_": PLUGIN, **default_mapping(settings, "hydra.launcher")})
