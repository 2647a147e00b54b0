"""The runs of a sweep, from its ``sweep.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedist.config import ConfigError
from moedist.report.run import is_run

SWEEP = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep folder says of its jobs.

    Attributes:
        folder: of the sweep.
        runs: folders of the jobs that have begun.
        keys: what the sweep varied, in the order of its overrides.
        absent: jobs without a folder, a sentence each.
    """

    folder: Path
    runs: tuple[Path, ...]
    keys: tuple[str, ...]
    absent: tuple[str, ...]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> Sweep:
    """Reads the record of a sweep.

    Raises:
        ConfigError: it cannot be read, or none of its jobs has begun.
    """
    try:
        fields = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        jobs = [(str(job["run_dir"]), str(job["state"]), str(job["message"])) for job in fields["jobs"]]
        keys = [_key(override) for job in fields["jobs"] for override in job["overrides"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "RUN", str(folder), f"holds a {SWEEP} that cannot be read ({error})", "Name the folders of its runs."
        ) from error
    begun = [folder / name for name, _, _ in jobs if is_run(folder / name)]
    if not begun:
        raise ConfigError("RUN", str(folder), "is a sweep of which no job has begun", "Wait for its first one.")
    absent = [
        f"Job {name} is {state.lower()}, without a run: {message}".rstrip(": ")
        for name, state, message in jobs
        if not is_run(folder / name)
    ]
    return Sweep(folder, tuple(begun), tuple(dict.fromkeys(keys)), tuple(absent))


def _key(override: str) -> str:
    """``moe.router.top_k`` of ``+moe.router.top_k=4``; ``moe.router.kind`` of ``moe/router=noisy``."""
    name = override.lstrip("+~").partition("=")[0]
    return f"{name.replace('/', '.')}.kind" if "/" in name else name


def expand(folders: Sequence[Path]) -> tuple[list[Path], list[Sweep]]:
    """The run folders that a command line means, each once, and the sweeps among them.

    Raises:
        ConfigError: a sweep's record cannot be read.
    """
    sweeps = [read_sweep(folder) for folder in folders if is_sweep(folder)]
    by_folder: dict[Path, Any] = {sweep.folder: sweep.runs for sweep in sweeps}
    runs = [run for folder in folders for run in by_folder.get(folder, (folder,))]
    return list(dict.fromkeys(runs)), sweeps
