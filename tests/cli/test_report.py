from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moedist.cli.main import main
from tests.report.folders import make_run, make_sweep

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moedist.report.page.charting_library", lambda: "const Plotly = {};")


def test_where_the_page_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output):
    monkeypatch.chdir(tmp_path)
    run, sweep = make_run(tmp_path / "run", num_steps=2), make_sweep(tmp_path / "sweep", num_jobs=2)
    assert main(["report", "run"]) == main(["report", "sweep"]) == main(["report", "run", "sweep"]) == 0
    assert (run / "report.html").is_file() and (sweep / "report.html").is_file() and Path("report.html").is_file()
    assert "Wrote report.html: 3 runs" in capsys.readouterr().out
    assert main(["report", "run", "--json", "-o", "other.html"]) == 0
    assert json.loads(capsys.readouterr().out) == {"exit_code": 0, "output": "other.html", "runs": 1}


def test_errors_go_to_people_and_to_scripts(tmp_path: Path, capsys: Output):
    for argv in (["report", str(tmp_path), "--json"], ["report", "--watch", str(tmp_path), "--json"]):
        assert main(argv) == 2
        said = capsys.readouterr()
        assert "holds no run" in said.err and json.loads(said.out)["exit_code"] == 2
    assert main(["report", "--watch", "--every", "0", str(tmp_path)]) == 2


def test_it_needs_no_torch(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=1)
    code = (
        "import sys; from moedist.report.run import read_run; from moedist.report.live import LiveReport; "
        "from moedist.report.listing import find_runs; from pathlib import Path; "
        f"LiveReport([Path({str(run)!r})]).data(); find_runs(Path({str(run)!r})); "
        "heavy = {'torch', 'hydra', 'pydantic', 'wandb', 'plotly'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
