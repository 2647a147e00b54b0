"""Finding and reading the files that a user names, with errors that say which file and what to do."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moedist.config import ConfigError


def as_patterns(files: str | tuple[str, ...]) -> tuple[str, ...]:
    """``data.files=a.txt`` means one file as ``data.files=[a.txt]`` does."""
    return (files,) if isinstance(files, str) else tuple(files)


@contextmanager
def reading(key: str, path: str | Path) -> Iterator[None]:
    """Turns an operating system's error about ``path`` into a `ConfigError` on ``key``."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(key, str(path), "does not exist", f"Set {key} to files that exist.") from None
    except PermissionError:
        remedy = f"Give this user read permission (chmod u+r on {path}, x on its folders) or name other files."
        raise ConfigError(key, str(path), "may not be read by this user", remedy) from None
    except IsADirectoryError:
        raise ConfigError(key, str(path), "is a folder where a file is needed", "Name the files in it.") from None
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "") + (f": {error.strerror}" if error.strerror else "")
        raise ConfigError(key, str(path), f"cannot be read ({reason})", "Check the disk and the path.") from None


def find_files(key: str, patterns: tuple[str, ...]) -> list[Path]:
    """The files that ``patterns`` name, in the order named.

    A pattern is a file, a glob (``**`` crosses folders), or a folder: every file below it that is not hidden, sorted by
    relative path. A file named twice counts once. Links in a folder may not lead out of it: a folder that came from
    elsewhere must not choose what is read; a link that the user names is followed.

    Raises:
        ConfigError: nothing is named, a pattern matches nothing, a file may not be read or is not a regular file, or
            a link leads out of its folder.
    """
    if not patterns:
        raise ConfigError(key, [], "names no files", f"Set {key} to files, globs or folders.")

    found: dict[Path, None] = {}
    for pattern in patterns:
        for path in _expand(key, str(as_path(pattern))):
            _require_regular(key, path)
            found[path] = None
    return list(found)


def as_path(name: str) -> Path:
    """A path as a user writes it, with ``~`` for the home folder."""
    return Path(name).expanduser()


def read_bytes(key: str, path: Path) -> bytes:
    """The whole of one file."""
    with reading(key, path), path.open("rb") as file:
        return file.read()


def _expand(key: str, pattern: str) -> list[Path]:
    path = Path(pattern)
    with reading(key, pattern):
        if path.is_dir():
            return _below(key, path)
        if path.exists() or not glob.has_magic(pattern):
            path.stat()
            return [path]
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [match for match in matches if not match.is_dir()]
    if not files:
        raise ConfigError(key, pattern, "matches no files", "Check the pattern; quote it so that the shell keeps it.")
    return files


def _below(key: str, folder: Path) -> list[Path]:
    def complain(error: OSError) -> None:
        raise error

    root = folder.resolve()
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=complain):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent) / name for name in names if not name.startswith(".")]
    for path in files:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            remedy = "Name the file that it leads to, or copy it into the folder."
            raise ConfigError(key, str(path), f"is a link that leads out of {folder}", remedy)
    if not files:
        raise ConfigError(key, str(folder), "holds no files", "Name a folder with files that are not hidden.")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _require_regular(key: str, path: Path) -> None:
    with reading(key, path):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(key, str(path), "is not a regular file", "Name files, not pipes or devices.")
