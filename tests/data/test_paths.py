from __future__ import annotations

import os
from pathlib import Path

import pytest

from moedist.config import ConfigError
from moedist.data.paths import find_files, read_bytes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ["b.txt", "a.txt", "sub/c.txt", "sub/d.md", ".hidden", ".git/e.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*patterns: str) -> list[str]:
    return [path.as_posix() for path in find_files("files", patterns)]


def test_files_globs_and_folders(folder: Path) -> None:
    assert found("b.txt", "a.txt") == ["b.txt", "a.txt"]
    assert found("*.txt") == ["a.txt", "b.txt"]
    assert found("**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert found(str(folder)) == [str(folder / name) for name in ["a.txt", "b.txt", "sub/c.txt", "sub/d.md"]]


def test_a_file_named_twice_counts_once(folder: Path) -> None:
    assert found("b.txt", "*.txt") == ["b.txt", "a.txt"]


def test_a_name_with_brackets_is_a_name_first(folder: Path) -> None:
    (folder / "x[1].txt").write_text("x")
    assert found("x[1].txt") == ["x[1].txt"]


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert found("~/a.txt") == [str(folder / "a.txt")]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((), "files = .* names no files. Set files to files, globs or folders."),
        (("none.txt",), "files = 'none.txt' does not exist. Set files to files that exist."),
        (("a.txt/b",), "files = 'a.txt/b' cannot be read .ENOTDIR.*Check the disk and the path."),
        (("*.none",), r"files = '\*.none' matches no files. Check the pattern"),
        (("empty",), "files = 'empty' holds no files. Name a folder with files that are not hidden."),
        (("pipe",), "files = 'pipe' is not a regular file. Name files, not pipes or devices."),
    ],
)
def test_errors(folder: Path, patterns: tuple[str, ...], message: str) -> None:
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match=message):
        find_files("files", patterns)


def test_a_folder_cannot_lead_out_of_itself(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("secret")
    (folder / "sub/link.txt").symlink_to(secret)
    (folder / "sub/folder").symlink_to(secret.parent)
    with pytest.raises(ConfigError, match=r"sub/link.txt' is a link that leads out of .*Name the file"):
        find_files("files", (str(folder),))
    (folder / "sub/link.txt").unlink()
    assert not any("secret" in name for name in found(str(folder)))
    (folder / "named.txt").symlink_to(secret)
    assert found("named.txt") == ["named.txt"]


def test_links_within_a_folder_are_fine(folder: Path) -> None:
    (folder / "sub/link.txt").symlink_to("../a.txt")
    assert str(folder / "sub/link.txt") in found(str(folder))


def test_no_read_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is planted: tests may run as a user whom no permission stops."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "a.txt")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match="files = 'a.txt' may not be read by this user. Give this user read perm"):
        read_bytes("files", Path("a.txt"))
