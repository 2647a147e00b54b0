"""The built wheel, unpacked elsewhere: what a user has who has no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel holds."""
    builder = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_conf_types_and_the_command(installed: Path):
    conf = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    carried = installed / "moedist" / "conf"
    assert {str(path.relative_to(carried)) for path in carried.rglob("*.yaml")} == conf
    package = {path.relative_to(ROOT) for path in (ROOT / "moedist").rglob("*") if "__pycache__" not in path.parts}
    assert all((installed / path).exists() for path in package), "data files (clusters, pages, py.typed) travel too"
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "moedist = moedist.cli.main:main" in entry_points.read_text()
    assert not list(installed.glob("tests")), "tests are not for users"


@pytest.mark.slow
def test_it_works_outside_the_checkout(installed: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = (
        "import moedist, sys; print(moedist.__file__); from moedist.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", "--dry-run", "mesh.ep=4"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(installed)) and str(tmp_path / "runs") in ended.stdout
