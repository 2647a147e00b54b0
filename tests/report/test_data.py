from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from moedist.report import data
from moedist.report.data import page_data, spread
from moedist.report.run import read_run
from tests.report.folders import make_run


def test_numbers_reach_the_page(tmp_path: Path):
    run = read_run(make_run(tmp_path / "run", num_steps=12))
    (shown,) = page_data([run])["runs"]
    assert shown["steps"] == list(range(1, 13)) and shown["num_steps"] == 40 and shown["blocks"] == [0, 1, 2, 3]
    assert shown["scalars"]["train/loss"] == pytest.approx([row["train/loss"] for row in run.rows], rel=1e-6)
    assert [step for step, loss in enumerate(shown["scalars"]["eval/loss"], 1) if loss is not None] == [10]
    assert shown["columns"]["max_vio"][5] == pytest.approx(run.rows[5]["moe/layers/max_vio"], rel=1e-6)
    packed = shown["experts"]["arrays"]["load"]
    load_SLE = np.frombuffer(base64.b64decode(packed["base64"]), packed["dtype"]).reshape(12, 4, 8)
    assert (load_SLE == run.experts.stack("load")).all()
    assert shown["config"]["moe.router.kind"] == "topk" and shown["environment"]["packages.torch"] == "2.13.0"
    json.dumps(shown, allow_nan=False)


def test_long_runs_are_thinned_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = read_run(make_run(tmp_path / "run", num_steps=30))
    monkeypatch.setattr(data, "MAX_ROWS", 10)
    monkeypatch.setattr(data, "MAX_CELLS", 4 * 32 * 7)
    (shown,) = page_data([run])["runs"]
    assert shown["steps"] == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 30]
    assert len(shown["experts"]["steps"]) == 7 and {1, 30} < set(shown["experts"]["steps"])
    assert shown["notes"] == [
        "Lines show one of every 3 of the 30 rows.",
        "Maps show 7 of the 30 steps that experts.bin holds.",
    ]
    assert spread(run.experts, 10**9) == list(run.experts.steps)


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    runs = [read_run(make_run(tmp_path / where, num_steps=1)) for where in ("a", "b", "c/a")]
    assert data.labels(runs[:1]) == ["first"] and data.labels(runs[:2]) == ["a", "b"]
    assert data.labels(runs) == [str(tmp_path / where) for where in ("a", "b", "c/a")]
