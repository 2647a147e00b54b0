"""Whether a run can go on from the checkpoint it names, as far as that shows before a rank starts.

The parent reads manifests, sizes and the index; the ranks read every byte before they use one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moedist.config import ConfigError
from moedist.launch.folder import choose_folder, compare_configs, find_run
from moedist.train.checkpoint import CheckpointError
from moedist.train.checkpoint.errors import NewerFormatError
from moedist.train.checkpoint.manifest import check_sizes, read_manifest
from moedist.train.checkpoint.shards import read_index
from moedist.train.checkpoint.state import check_state, flatten
from moedist.train.config import RunConfig


def check_resume(config: RunConfig, mapping: Mapping[str, Any], model: nn.Module) -> None:
    """Checks the checkpoint that a run would go on from; touches nothing.

    Args:
        config: decoded.
        mapping: the same as plain mappings, to be compared with what a checkpoint apart from its run says itself.
        model: of the configuration, on the meta device.

    Raises:
        ConfigError: no checkpoint can be used, or it is of another model.
        ConfigErrors: keys that differ from the checkpoint's.
    """
    resume = config.run.resume
    if resume == "never":
        return
    folder = choose_folder(config.run) if resume == "auto" else Path(resume).expanduser().absolute()
    try:
        checkpoint = newest_usable(folder)
        if checkpoint is None:
            return
        manifest = read_manifest(checkpoint)
        if resume != "auto" and find_run(folder) is None and "config" in manifest.meta:
            compare_configs(manifest.meta["config"], mapping, config.run.allow_changes, checkpoint)
        live = flatten({"model": model.state_dict()})
        check_state(live, ("model",), read_index(checkpoint, manifest), checkpoint)
    except CheckpointError as error:
        raise ConfigError(
            "run.resume",
            resume,
            f"cannot go on: {str(error).rstrip('.')}",
            "Name one that is sound and of this model (`moedist checkpoint verify` and `inspect` tell), or start anew.",
        ) from error


def newest_usable(folder: Path) -> Path | None:
    """The checkpoint at ``folder``, or the newest of a run whose files have their sizes; None where there is none.

    Raises:
        CheckpointError: there are some and none has, or a newer version wrote the newest: a run that went on from the
            one before would replace it.
    """
    places = [folder / "checkpoints", folder]
    found = [sorted(place.glob("step_*"), reverse=True) for place in places]
    steps = next((paths for paths in found if paths), [])
    if not steps:
        if not (folder / "manifest.json").is_file():
            return None
        check_sizes(folder)
        return folder
    problems = []
    for path in steps:
        try:
            check_sizes(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path
    raise CheckpointError("; ".join(problems))
