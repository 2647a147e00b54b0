"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moedist.config import require
from moedist.train.checkpoint.errors import disk_errors
from moedist.train.checkpoint.manifest import sync_folder


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside ``path`` that gets its name at the end of the block, and is removed if that fails.

    Raises:
        ConfigError: there is something at ``path`` already.
        DiskError: the disk refuses.
    """
    path = path.expanduser().absolute()
    check_new(path)
    draft = path.with_name(f".{path.name}.tmp-{secrets.token_hex(3)}")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.mkdir()
        with disk_errors(path.parent):
            yield draft
            for file in draft.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            sync_folder(draft)
            check_new(path)
            draft.rename(path)
            sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_new(path: Path) -> None:
    """Raises `ConfigError` where there is something at ``path``."""
    require(
        not os.path.lexists(path.expanduser()),
        "OUTPUT",
        str(path),
        "exists already",
        "Name a folder that does not exist yet: nothing is overwritten.",
    )
