"""Why a checkpoint cannot be written or used. Raised with the same meaning on every rank."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that cannot be used: incomplete, damaged, hostile, or of another model. The live state is whole."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version has written: sound, and so neither to be passed over nor to be replaced."""


class DiskError(CheckpointError):
    """A checkpoint that could not be written; those written before it are intact."""


class NoRoomError(DiskError):
    """The disk has no room for a checkpoint.

    Attributes:
        path: the folder of checkpoints that it should have joined.
        need: bytes of the whole checkpoint, over all ranks.
        free: bytes that the disk had left.
    """

    def __init__(self, path: Path, need: int, free: int):
        super().__init__(path, need, free)
        self.path, self.need, self.free = path, need, free

    def __str__(self) -> str:
        return (
            f"no room for a checkpoint in {self.path}: it needs {self.need} bytes and the disk has "
            f"{self.free} bytes free. Free some space, lower checkpoint.keep, or set run.dir to a larger disk. "
            f"The checkpoints before it are intact."
        )


@contextlib.contextmanager
def disk_errors(path: Path, need: int = 0) -> Iterator[None]:
    """Turns what the operating system says while writing below ``path`` into a `DiskError`.

    Args:
        path: the folder of checkpoints.
        need: bytes of the whole checkpoint, for the message.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError(path, need, shutil.disk_usage(path).free) from error
        raise DiskError(
            f"cannot write to {path}: {cause}. Check that its disk is there and writable, or set run.dir to another."
        ) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind ``error``: torch's archive writer, torn down by one, raises a RuntimeError over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
