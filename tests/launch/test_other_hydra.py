"""The other line of hydra-core, in a virtual environment beside this one: the configuration's tests, and a sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import hydra
import pytest

from tests.end_to_end.runs import TINY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OTHER = "hydra-core==1.4.0rc3" if hydra.__version__.startswith("1.3.") else "hydra-core==1.3.8"
TESTS = ("tests/config", "tests/launch/sweep", "tests/launch/test_compose.py", "tests/launch/test_conf.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the other line, and all else from this environment."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "--quiet", OTHER], capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"cannot install {OTHER}: {installed.stderr[-300:]}")
    return python


def run(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'plugin' / 'src'}", "WANDB_MODE": "disabled"}
    return subprocess.run([python, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_it_is_the_other_line(python: Path):
    said = run(python, "-c", "import hydra, torch; print(hydra.__version__)")
    assert said.stdout.strip() == OTHER.partition("==")[2] != hydra.__version__, said.stderr


def test_the_tests_of_the_configuration_pass(python: Path):
    ended = run(python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-m", "not slow", *TESTS)
    print(ended.stdout[-3000:])
    assert ended.returncode == 0, ended.stdout[-3000:]


def test_a_sweep_runs(python: Path, tmp_path: Path):
    short = ("train.steps=8", "train.eval_every=4", "hydra.launcher.ranks_per_job=2")
    values = ("moe.capacity.factor=1.0,2.0", "moe/router=topk,noisy")
    ended = run(python, "-m", "moedist", "train", "-m", *TINY, *short, *values, f"run.dir={tmp_path / 'sweep'}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["COMPLETED"] * 4
    assert "Warning" not in ended.stderr, ended.stderr
