"""Measuring a checkpoint: its own configuration, dropless, in a folder below its run."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.launch.compose import Composed, compose_onto
from moedist.launch.outcome import last_good_checkpoint
from moedist.launch.start import Ranks, plan_ranks
from moedist.train.checkpoint import CheckpointError, read_meta


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What to measure, and as what.

    Attributes:
        checkpoint: its folder, absolute.
        composed: the configuration that it was trained with, dropless, with overrides; ``run.dir`` is the folder of
            the evaluation.
        ranks: of this machine, which measure it.
    """

    checkpoint: Path
    composed: Composed
    ranks: Ranks


def plan_evaluation(
    path: Path, overrides: Sequence[str] = (), now: datetime.datetime | None = None, room: str = "eval"
) -> Evaluation:
    """Reads what a checkpoint was trained with.

    The capacity limit is a means of training: the finished model is measured without it, on one node, whose ranks may
    be fewer than those that trained it.

    Args:
        path: a checkpoint, or a run folder for its newest one.
        overrides: as on the command line.
        now: names the evaluation's folder.
        room: the folder below the run in which that one lies.

    Raises:
        ConfigErrors: there is no checkpoint, it is damaged, or the overrides don't fit.
    """
    checkpoint = find_checkpoint(path)
    try:
        saved = dict(read_meta(checkpoint)["config"])
    except (CheckpointError, KeyError) as error:
        raise ConfigError(
            "CHECKPOINT", str(path), f"cannot be read: {error}", "Name another checkpoint of the run."
        ) from error
    stamp = f"{now or datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = checkpoint.parents[1] / room / f"{stamp}_{checkpoint.name}"
    saved["run"] = {**saved["run"], "dir": str(folder), "resume": "never", "allow_changes": []}
    saved["launch"] = {**saved["launch"], "nnodes": 1, "rendezvous": None, "max_restarts": 0}
    saved = without_limits(saved)
    wanted = compose_onto(saved, overrides).config
    ranks = plan_ranks(wanted.launch, wanted.mesh.device)
    saved["mesh"] = fit_mesh(saved["mesh"], ranks.world_size)
    return Evaluation(checkpoint, compose_onto(saved, overrides), ranks)


def fit_mesh(mesh: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The layout of a run on as many ranks as there are, which changes nothing of what it computes: each size is the
    largest that divides both its own and theirs.

    >>> fit_mesh({"ep": 8, "fsdp": 16, "ranks_per_node": None}, world_size=4)
    {'ep': 4, 'fsdp': 4, 'ranks_per_node': None}
    """
    sizes = {key: mesh.get(key) for key in ("ep", "fsdp", "ranks_per_node")}
    return {**mesh, **{key: size and math.gcd(size, world_size) for key, size in sizes.items()}}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest whole one of a run folder.

    Raises:
        ConfigError: there is none.
    """
    path = path.expanduser().absolute()
    if (path / "manifest.json").is_file():
        return path
    newest = last_good_checkpoint(path)
    if newest is None:
        raise ConfigError(
            "CHECKPOINT", str(path), "is no checkpoint and holds none", "Name a run folder or <run>/checkpoints/step_N."
        )
    return newest


def without_limits(value: Any) -> Any:
    """Plain mappings with every capacity, of the run and of single layers, set to dropless."""
    if isinstance(value, list):
        return [without_limits(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    plain = {key: without_limits(inner) for key, inner in value.items()}
    if isinstance(plain.get("capacity"), dict):
        plain["capacity"] |= {"factor": None, "final_factor": None, "expert_capacity": None, "eval_factor": "train"}
    return plain
