"""The run folder: made once, by one process, and never another run's.

A folder belongs to whoever holds the lock on its ``run.lock``: the kernel gives the lock back when its holders are
gone, however they went, so a lock never has to be broken by hand. The file names the holder for people.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moedist.config import ConfigError, ConfigErrors
from moedist.config.exit_codes import ExitCode
from moedist.launch.saved import CONFIG, read_mapping, write_config
from moedist.train.config import RunFolder
from moedist.train.identity import FREE_KEYS, covered, flatten
from moedist.train.lock import LOCK, describe_holder
from moedist.train.status import clear_status


class FolderError(ConfigError):
    """A run folder that the environment refuses: no permission, no room."""

    exit_code = ExitCode.ENVIRONMENT


@dataclasses.dataclass
class RunClaim:
    """A run folder that this process holds.

    Attributes:
        path: the folder, absolute.
        lock: descriptor of the locked file; processes that inherit it hold the folder too.
        resumed: whether an earlier start of the run is there.
        changes: what differs from the earlier start and is allowed to, as lines for people.
    """

    path: Path
    lock: int
    resumed: bool = False
    changes: tuple[str, ...] = ()

    def release(self) -> None:
        """Gives the folder back; harmless when done twice."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def choose_folder(config: RunFolder, now: datetime.datetime | None = None) -> Path:
    """The folder of a run: ``run.dir``, or a new name below ``runs/``."""
    if config.dir is not None:
        return Path(config.dir).expanduser().absolute()
    name = re.sub(r"[^\w.-]+", "-", config.name)
    return Path("runs").absolute() / f"{now or datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"


def check_folder(config: RunFolder, mapping: Mapping[str, Any]) -> list[ConfigError]:
    """What is wrong with a run's folder and its ``resume``, without touching anything."""
    try:
        if config.resume not in ("never", "auto"):
            source = find_run(Path(config.resume))
            if source is not None:
                compare_configs(read_mapping(source / CONFIG), mapping, config.allow_changes, source)
        elif config.resume == "auto" and config.dir is None:
            raise ConfigError(
                "run.resume", "auto", "needs a folder to come back to", "Set run.dir to the folder of the run."
            )
        if config.dir is not None:
            folder = choose_folder(config)
            _check_contents(folder, config)
            if config.resume == "auto" and (folder / CONFIG).is_file():
                compare_configs(read_mapping(folder / CONFIG), mapping, config.allow_changes, folder)
    except ConfigErrors as errors:
        return list(errors.errors)
    except ConfigError as error:
        return [error]
    return []


def find_run(resume: Path) -> Path | None:
    """The run folder that ``run.resume=PATH`` names, or that holds the checkpoint it names; None for a lone checkpoint.

    Raises:
        ConfigError: there is nothing at the path.
    """
    path = resume.expanduser().absolute()
    if not path.is_dir():
        raise ConfigError(
            "run.resume",
            str(resume),
            "is no folder",
            "Name a checkpoint's folder or a run folder, or set never or auto.",
        )
    if not any(any(path.glob(f"{below}manifest.json")) for below in ("", "*/", "checkpoints/*/")):
        raise ConfigError(
            "run.resume",
            str(resume),
            "holds no checkpoint",
            "Name a checkpoint's folder or a run folder that has one, or set never to start afresh.",
        )
    return next((folder for folder in (path, *list(path.parents)[:2]) if (folder / CONFIG).is_file()), None)


def claim_folder(config: RunFolder, mapping: Mapping[str, Any]) -> RunClaim:
    """Makes the run folder, or takes it over where ``run.resume=auto``, and writes the configuration into it.

    Two processes that want one folder never both get it. An earlier start's ``config.yaml`` that differs is kept as
    ``config_1.yaml`` and so on.

    Raises:
        ConfigError: the folder holds another run or is in use, or a resumed run's configuration has changed.
        FolderError: it cannot be made or written.
    """
    path = choose_folder(config)
    try:
        claim = lock_folder(path, fresh=config.dir is None)
    except OSError as error:
        raise refused(path, error) from error
    path = claim.path
    try:
        _check_contents(path, config)
        saved = path / CONFIG
        if saved.is_file():
            claim.resumed = True
            earlier = read_mapping(saved)
            claim.changes = compare_configs(earlier, mapping, config.allow_changes, path)
            if earlier != mapping:
                shutil.copy2(saved, _next_name(path))
        for name in ("logs", "checkpoints"):
            (path / name).mkdir(exist_ok=True)
        clear_status(path)
        write_config(saved, mapping)
    except OSError as error:
        claim.release()
        raise refused(path, error) from error
    except ConfigError:
        claim.release()
        raise
    return claim


def compare_configs(
    old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str], folder: Path
) -> tuple[str, ...]:
    """Compares a run's configuration with that of its earlier start.

    Args:
        old, new: plain mappings, as in ``config.yaml``.
        allowed: dotted keys, whole branches too, that may differ beside `FREE_KEYS`.
        folder: where ``old`` lies.

    Returns:
        one line per difference that is allowed; ``run`` and ``launch`` go unsaid.

    Raises:
        ConfigErrors: every other difference.
    """
    before, after = flatten(old), flatten(new)
    lines, errors = [], []
    for key in dict.fromkeys([*before, *after]):
        if key in before and key in after and before[key] == after[key]:
            continue
        was, now = before.get(key), after.get(key)
        if covered(key, FREE_KEYS) or covered(key, allowed):
            if not covered(key, ("run", "launch")):
                lines.append(f"{key}: {was!r} -> {now!r}")
            continue
        was_text = "has no such key" if key not in before else f"has {was!r}"
        errors.append(
            ConfigError(
                key,
                now,
                f"differs from the run in {folder}, which {was_text}",
                f"Set it back, start a new run in another run.dir, or accept it with run.allow_changes=[{key}].",
            )
        )
    if errors:
        raise ConfigErrors(errors)
    return tuple(lines)


def _check_contents(path: Path, config: RunFolder) -> None:
    """Raises `ConfigError` where the folder is not this run's to use."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError("run.dir", str(path), "is a file", "Name a folder that does not exist yet.")
    try:
        names = {entry.name for entry in path.iterdir()} - {LOCK}
        if "logs" in names and all(log.name.startswith("launcher") for log in (path / "logs").iterdir()):
            names.remove("logs")  # launchers of several nodes write before rank 0 makes the run
    except OSError as error:
        raise refused(path, error) from error
    if not names:
        return
    if CONFIG not in names:
        raise ConfigError(
            "run.dir", str(path), "is not empty and holds no run", "Name an empty folder, or one that does not exist."
        )
    if config.resume != "auto":
        raise ConfigError(
            "run.dir",
            str(path),
            "holds a run already",
            "Name another run.dir, or continue that run with run.resume=auto.",
        )


def lock_folder(path: Path, *, fresh: bool) -> RunClaim:
    """Makes the folder where it is missing and locks it; a ``fresh`` one gets another name until it is new."""
    wanted, attempt = path, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            path.mkdir(exist_ok=not fresh)
            break
        except FileExistsError:
            if not fresh:
                raise ConfigError("run.dir", str(path), "is a file", "Name a folder that does not exist yet.") from None
            attempt += 1
            path = wanted.with_name(f"{wanted.name}_{attempt}")
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            "run.dir",
            str(path),
            f"is in use by {describe_holder(path)}",
            "Wait until that run has ended, or name another run.dir.",
        ) from None
    except OSError:
        os.close(lock)
        raise
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(lock, 0)
    os.write(lock, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())
    return RunClaim(path, lock)


def refused(path: Path, error: OSError) -> FolderError:
    """What a user sees of a folder that the environment refuses."""
    return FolderError(
        "run.dir",
        str(path),
        f"cannot be written ({error.strerror or error})",
        "Name a folder on a disk with room that you may write to.",
    )


def _next_name(path: Path) -> Path:
    number = 1
    while (path / f"config_{number}.yaml").exists():
        number += 1
    return path / f"config_{number}.yaml"
