"""Who a run is, in trackers and in its checkpoints: the same after a restart, another one after a change."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

FREE_KEYS = (
    "run",
    "launch",
    "mesh",
    "engine",
    "log",
    "checkpoint",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.activation_checkpointing",
    "train.compile",
)
"""What a resumed run may change without being asked, and is the same run: where it runs, how it is watched, and when it
ends."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Stable names of a run: 8 letters and digits each.

    Attributes:
        run_id: of the run.
        group_id: of the run that it began as; equal to ``run_id`` for a fresh start.
        began_step: the step behind which it is this run; 0 for a fresh start.
    """

    run_id: str
    group_id: str
    began_step: int


def identify(meta: Mapping[str, Any] | None, own: bool, config: Mapping[str, Any]) -> Identity:
    """Who a run is that goes on from a checkpoint.

    The same run as before where the checkpoint is its own and the configuration is the one that wrote it; else a new
    one, grouped with the one that it comes from.

    Args:
        meta: of the checkpoint; None for a fresh start.
        own: whether it lies in the run's own folder, and not in the one of a run that this one branches off.
        config: as the run folder holds it.
    """
    new = secrets.token_hex(4)
    if meta is None:
        return Identity(new, new, 0)
    group_id = meta.get("group_id", meta["run_id"])
    if own and _asked(meta["config"]) == _asked(config):
        return Identity(meta["run_id"], group_id, meta.get("began_step", meta["step"]))
    return Identity(new, group_id, meta["step"])


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run the run that it is."""
    return {key: value for key, value in flatten(config).items() if not covered(key, FREE_KEYS)}


def covered(key: str, branches: Sequence[str]) -> bool:
    """Whether a dotted key is one of the branches, or lies below one."""
    return any(key == branch or key.startswith(f"{branch}.") for branch in branches)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
