"""The sources of Python's own standard library, byte by byte: real text that every machine already has."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

from moedist.config import ConfigError, require
from moedist.data.contract import DataConfig, Source
from moedist.data.corpus import BYTE_VOCAB_SIZE, MemorySource, concatenate, encode_bytes, hash_named, hold_out
from moedist.data.paths import read_bytes, reading

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"})
"""Folders whose files are not taken, at any depth: other people's packages, tests and the editor."""


@dataclasses.dataclass(frozen=True)
class PythonStdlibConfig(DataConfig):
    """``*.py`` below the standard library's folder, one document per file, 257 ids: bytes, and 256 to end a document.

    Files are sorted by relative path. The corpus differs between Python versions and distributions; its hash, which
    the start of a run prints, says which it was.

    Attributes:
        holdout_every: every n-th file is held out, beginning with the n-th.
    """

    holdout_every: int = 20

    def __post_init__(self) -> None:
        require(
            self.holdout_every >= 2, "holdout_every", self.holdout_every, "leaves nothing to train on", "Set 2 or more."
        )

    def open(self) -> Source:
        """Reads the files, about 11 MB."""
        root = Path(sysconfig.get_paths()["stdlib"])
        with reading("kind", root):
            paths = stdlib_files(root)
        if len(paths) < self.holdout_every:
            remedy = "Install Python with its sources, or train on your own files with data=text."
            raise ConfigError("kind", self.kind, f"finds only {len(paths)} Python files below {root}", remedy)
        named = [(path.relative_to(root).as_posix(), read_bytes("kind", path)) for path in paths]
        fingerprint = hash_named(named)
        train, valid = hold_out([encode_bytes(content) for _, content in named], self.holdout_every)
        size = sum(len(content) for _, content in named)
        held = sum(len(document) for document in valid)
        description = (
            f"python_stdlib: {len(paths)} files, {size / 1e6:.1f} MB, every {self.holdout_every}th held out "
            f"({len(valid)} files, {held / 1e6:.2f} MB), sha256 {fingerprint[:16]}"
        )
        return MemorySource(BYTE_VOCAB_SIZE, fingerprint, True, description, concatenate(train), concatenate(valid))


def stdlib_files(root: Path) -> list[Path]:
    """The corpus's files below ``root``, sorted by relative path."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) and path.is_file():
            found.append((relative.as_posix(), path))
    return [path for _, path in sorted(found)]
