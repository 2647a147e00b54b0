"""What makes a folder a checkpoint: `manifest.json`, written last, with the size and SHA-256 of every file.

`torch.distributed.checkpoint` notices neither flipped bits nor a shard of another step, so nothing is read from a
checkpoint before its manifest has vouched for it. The manifest vouches for itself too: it ends in the hash of its own
contents and is valid only byte for byte as it was written. It finds damage, not forgery: whoever can write the folder
can write a manifest, so files are still never unpickled freely.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedist.train.checkpoint.errors import CheckpointError, NewerFormatError

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of the manifest and of the folder's layout."""

_STEP = re.compile(r"step_(\d{8,})")


def folder_name(step: int) -> str:
    """The name of a step's folder; names sort as their steps do."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a folder's name speaks of; None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class FileSeal:
    """What a file was when it was written: its size in bytes and its SHA-256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileSeal:
        """The seal of a file as it lies on disk."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        step: optimizer steps taken.
        num_ranks: ranks that wrote it.
        files: name -> seal of every other file of the folder.
        meta: what the run wants to know when it goes on (run id, layout, config hash, data position, ...); JSON.
    """

    step: int
    num_ranks: int
    files: Mapping[str, FileSeal]
    meta: Mapping[str, Any]

    def render(self) -> str:
        """The text of `manifest.json`."""
        body = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return _json({**body, "sha256": _digest(body)}) + "\n"

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """The inverse of `render`.

        Raises:
            NewerFormatError: a newer version rendered it.
            ValueError, KeyError, TypeError, AttributeError: the text is not one that `render` gave.
        """
        body = json.loads(text)
        if body["schema"] != SCHEMA:
            problem = f"schema {body['schema']!r} is not {SCHEMA}, the one that this version reads"
            if body["schema"] > SCHEMA and body.pop("sha256") == _digest(body):
                raise NewerFormatError(f"{problem}; a newer moedist wrote it")
            raise ValueError(problem)
        files = {name: FileSeal(**seal) for name, seal in body["files"].items()}
        for name in files:
            if Path(name).name != name:  # a file elsewhere is not part of the checkpoint
                raise ValueError(f"{name!r} is not the name of a file")
        manifest = cls(body["step"], body["num_ranks"], files, body["meta"])
        if manifest.render() != text:
            raise ValueError("its own hash does not match")
        return manifest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(body).encode()).hexdigest()


def _json(value: Any) -> str:
    # ensure_ascii would write one character in two ways (\u00e9, \u00E9), and a flipped bit could go unseen
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes a checkpoint's folder; on return all of it has reached the disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8", newline="") as file:
        file.write(manifest.render())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk; syncing a file does not bring its name there."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, itself verified, the files it names not.

    Raises:
        NewerFormatError: a newer version wrote it.
        CheckpointError: there is none (the checkpoint is incomplete), damaged, or of another step than its folder.
    """
    try:
        manifest = Manifest.parse((path / MANIFEST).read_bytes().decode())
    except FileNotFoundError:
        problem = "is incomplete: it has no manifest.json" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {problem}") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    except NewerFormatError as error:
        raise NewerFormatError(f"checkpoint {path} cannot be read: in its manifest.json {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} has a damaged or foreign manifest.json: {error}") from None
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"checkpoint {path} has the manifest of step {manifest.step}")
    return manifest


def check_file(path: Path, expected: FileSeal) -> None:
    """Compares a file with its seal.

    Raises:
        CheckpointError: it is missing or differs; names the file, and the expected and actual size or hash.
    """
    _check_size(path, expected)
    try:
        actual = FileSeal.of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if actual != expected:
        raise CheckpointError(f"{path} has SHA-256 {actual.sha256} instead of {expected.sha256}")


def _check_size(path: Path, expected: FileSeal) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if size != expected.size:
        raise CheckpointError(f"{path} has {size} bytes instead of {expected.size}")


def check_sizes(path: Path) -> None:
    """Compares a checkpoint's files with their sizes alone: finds what is missing or cut short, in no time.

    Raises:
        CheckpointError: names the file, and the expected and actual size.
    """
    for name, seal in read_manifest(path).files.items():
        _check_size(path / name, seal)


def verify(path: Path) -> Manifest:
    """Reads every byte of a checkpoint and compares it with the manifest. Needs no other rank.

    Raises:
        CheckpointError: names the first file that differs, and how.
    """
    manifest = read_manifest(path)
    for name, seal in manifest.files.items():
        check_file(path / name, seal)
    return manifest


def read_meta(path: Path) -> Mapping[str, Any]:
    """The run's own entries in a checkpoint's manifest, without reading the shards.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    return read_manifest(path).meta


def find_damage(path: Path) -> list[str]:
    """Every way in which a checkpoint's files differ from its manifest, a sentence each; none for a sound one."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, seal in manifest.files.items():
        try:
            check_file(path / name, seal)
        except CheckpointError as error:
            found.append(str(error))
    return found
