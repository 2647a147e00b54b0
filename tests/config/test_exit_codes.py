"""Exit codes mean one thing in the whole product, and the pages say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moedist.cli.main import EPILOG, main
from moedist.config.exit_codes import MEANINGS, ExitCode
from moedist.mesh import Mesh
from moedist.train.ending import Ending
from moedist.train.status import EXIT_CODES

ROOT = Path(__file__).parents[2]


def test_the_readme_and_the_help_list_them_all():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [(int(code), meaning) for code, meaning in rows] == list(MEANINGS.items())
    assert set(MEANINGS) == set(ExitCode)
    for code in ExitCode:
        assert re.search(rf"^  {code:d} +\w", EPILOG, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "exit_code"),
    [
        (["train", "--cfg", "job"], ExitCode.DONE),
        (["train", "mesh.epp=2"], ExitCode.CONFIG),
        (["train", "launch.nproc=4", "mesh.ep=3"], ExitCode.CONFIG),
        (["train", "launch.nnodes=2", "data=synthetic", "run.dir=shared"], ExitCode.CONFIG),
        (["train", "launch.nproc=1", "mesh.ep=1", "data=synthetic", "run.dir=/proc/run"], ExitCode.ENVIRONMENT),
        (["eval", "nowhere"], ExitCode.CONFIG),
        (["doctor", "parity", "mesh.epp=2"], ExitCode.CONFIG),
        (["checkpoint", "verify", "nowhere"], ExitCode.CONFIG),
        (["tokenize", "nowhere.txt", "-o", "out.bin"], ExitCode.CONFIG),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands(argv: list[str], exit_code: ExitCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == exit_code


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (torch.OutOfMemoryError("no room for 3 GiB"), ExitCode.NO_FIT),
        (RuntimeError("Connection closed by peer"), ExitCode.RANK_FAILED),
        (OSError(28, "No space left on device"), ExitCode.ENVIRONMENT),
        (KeyError("x"), ExitCode.RANK_FAILED),
    ],
)
def test_errors_of_a_rank(error: Exception, exit_code: ExitCode, tmp_path: Path):
    assert Ending(tmp_path, Mesh.alone()).explain(error)[2] == exit_code


def test_a_run_that_was_stopped_and_saved_may_be_told_from_one_that_failed():
    assert [reason for reason, code in EXIT_CODES.items() if code == ExitCode.PREEMPTED] == ["preempted"]
    assert EXIT_CODES["done"] == ExitCode.DONE
