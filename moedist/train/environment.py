"""What code ran on what machine: for the record of a run, and nothing that could be a secret."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import moedist
from moedist.mesh import Mesh

PACKAGES = ("torch", "numpy", "hydra-core", "wandb", "deepspeed")
GIT_S = 5.0


def describe_environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, the code's revision, the hardware and the ranks, as plain mappings. No environment variable, no user,
    no host and no path."""
    cuda = mesh.device.type == "cuda"
    return {
        "moedist": moedist.__version__,
        "code": code_revision(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(mesh.device) if cuda else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": mesh.dp.size,
        "ep": mesh.ep.size,
    }


def code_revision() -> str | None:
    """The commit of the checkout that this package runs from, ``-dirty`` where files differ; None outside of one."""
    root = Path(moedist.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
