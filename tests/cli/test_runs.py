from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedist.cli.main import main
from tests.report.folders import make_run, make_sweep

Output = pytest.CaptureFixture[str]


def test_runs_and_those_of_sweeps(tmp_path: Path, capsys: Output):
    make_run(tmp_path / "b", num_steps=20)
    make_run(tmp_path / "a", num_steps=0, ended=None)
    make_sweep(tmp_path / "s", num_jobs=1)
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["runs", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "run",
        "state",
        "step",
        "train",
        "loss",
        "eval",
        "loss",
        "drop",
        "rate",
        "MaxVio",
        "tokens/s",
    ]
    assert [line.split()[:3] for line in lines] == [
        ["a", "stale", "0/40"],
        ["b", "done", "20/40"],
        ["s/000", "done", "10/40"],
    ]
    assert main(["runs", str(tmp_path / "b"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["state"], run["step"], run["num_steps"]) == ("first", "done", 20, 40)
    assert run["train/loss"] == pytest.approx(1.772, abs=0.02) and run["moe/max_vio"] > 0


def test_no_runs(tmp_path: Path, capsys: Output):
    assert main(["runs", str(tmp_path)]) == 0 and capsys.readouterr().out == f"No run below {tmp_path}.\n"
    assert main(["runs", str(tmp_path / "nowhere")]) == 2 and "is no folder" in capsys.readouterr().err
