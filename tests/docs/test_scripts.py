"""The scripts of launch/ say what is missing, touch nothing that is not theirs, and install once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

TOOLS = ("bash", "env", "dirname", "basename", "cat", "date", "sha256sum", "ls")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without Python; its programs lie in ``tmp_path / "bin"``."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    return {"PATH": str(tmp_path / "bin"), "MOEDIST_VENV": str(tmp_path / "venv")}


def call(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_without_python(bare: dict[str, str], tmp_path: Path):
    for script in ("quickstart.sh", "test.sh", "test_full.sh"):
        ended = call([str(ROOT / "launch" / script)], bare, tmp_path)
        assert ended.returncode == 4
        assert ended.stderr == f"{script}: no Python 3.11 or newer on PATH. Install one, with its venv module.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_without_venv_module(bare: dict[str, str], tmp_path: Path):
    write_program(tmp_path / "bin" / "python3", '[[ "$2" != *ensurepip* ]]')
    ended = call([str(ROOT / "launch" / "quickstart.sh")], bare, tmp_path)
    assert ended.returncode == 4
    assert "python3 has no venv module. On Debian and Ubuntu: apt-get install python3-venv" in ended.stderr


def test_a_folder_that_is_something_else_stays(bare: dict[str, str], tmp_path: Path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("years of work")
    ended = call([str(ROOT / "launch" / "test.sh")], bare, tmp_path)
    assert ended.returncode == 4 and "is no virtual environment. Set MOEDIST_VENV" in ended.stderr
    assert (tmp_path / "venv" / "thesis.txt").read_text() == "years of work"


def test_installs_once(tmp_path: Path):
    log = tmp_path / "pip.log"
    log.touch()
    write_program(tmp_path / "venv" / "bin" / "python", f'[[ $1 != -m ]] || echo "$@" >>{log}')
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    prepare = f'source "{ROOT}/launch/venv.sh"; CONSTRAINTS="{tmp_path}/constraints.txt"; set -e; prepare_venv test'
    environment = {**os.environ, "MOEDIST_VENV": str(tmp_path / "venv")}

    def installs() -> int:
        before = len(log.read_text().splitlines())
        assert call(["bash", "-c", prepare], environment, tmp_path).returncode == 0
        return len(log.read_text().splitlines()) - before

    assert installs() == 2, "torch alone, then moedist"
    assert installs() == 0
    (tmp_path / "constraints.txt").write_text("torch==2\n")
    assert installs() == 2
    first, second = log.read_text().splitlines()[:2]
    assert first.endswith(" torch") and second.endswith(f"--editable {ROOT}[test]")


SKIPPED = '<skipped message="needs a moon"/>'


@pytest.fixture
def full(tmp_path: Path, bare: dict[str, str]) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs test_full.sh, every program there, on what a test run left: ``test.sh`` is a stub that leaves it."""
    (tmp_path / "root" / "launch").mkdir(parents=True)
    for name in ("test_full.sh", "venv.sh", "constraints.txt"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "root" / "launch" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "root")
    python = f'[[ $1 != -m ]] || exit 0; [[ $* != *torch* ]] || exit 1; exec {sys.executable} "$@"'
    write_program(tmp_path / "venv" / "bin" / "python", python)
    programs = re.search(r"PROGRAMS=\((.*?)\)", (ROOT / "launch" / "test_full.sh").read_text(), re.DOTALL)
    assert programs is not None
    for pair in programs[1].split():
        write_program(tmp_path / "bin" / pair.partition(":")[0], "")
    for name in ("mktemp", "rm", "sort"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)

    def run(case: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        report = f'<testsuite><testcase classname="sky" name="test_up">{case}</testcase></testsuite>'
        leave = (
            f"for word; do [[ $word != --junit-xml=* ]] || echo '{report}' >${{word#*=}}; done; echo $*; exit {code}"
        )
        write_program(tmp_path / "root" / "launch" / "test.sh", leave)
        return call([str(tmp_path / "root" / "launch" / "test_full.sh"), "-k", "up"], bare, tmp_path)

    return run


def test_a_skip_fails_the_full_tests(full: Callable[..., subprocess.CompletedProcess[str]]):
    passed = full("")
    assert passed.returncode == 0 and passed.stdout.splitlines()[-1].startswith("-m not gpu --junit-xml=")
    assert passed.stdout.rstrip().endswith(" -k up")
    skipped = full(SKIPPED)
    assert skipped.returncode == 1 and "skipped: sky::test_up: needs a moon\n" in skipped.stdout
    assert "1 skipped: mend what is skipped" in skipped.stderr
    failed = full("<failure/>", code=3)
    assert failed.returncode == 3
    assert "skipped: sky::test_up" in full(SKIPPED, code=1).stdout, "a failure does not hide it"


def test_a_missing_program_is_named(full: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    for name in ("zsh", "git"):
        (tmp_path / "bin" / name).unlink()
    ended = full("")
    assert ended.returncode == 4
    assert ended.stderr == "test_full.sh: install first, as root: git zsh (names of Debian's packages)\n"


def test_a_failed_installation_is_tried_again(tmp_path: Path):
    write_program(tmp_path / "venv" / "bin" / "python", "[[ $1 != -m ]]")
    environment = {**os.environ, "MOEDIST_VENV": str(tmp_path / "venv")}
    for _ in range(2):
        ended = call([str(ROOT / "launch" / "quickstart.sh")], environment, tmp_path)
        assert ended.returncode == 4 and "pip could not install torch" in ended.stderr
