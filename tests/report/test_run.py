from __future__ import annotations

import fcntl
import json
from pathlib import Path

import numpy as np
import pytest

from moedist.config import ConfigError
from moedist.report.run import read_run
from moedist.report.state import HEARTBEAT_S, state_of
from moedist.report.sweep import expand
from moedist.train.lock import LOCK
from moedist.train.status import write_status
from tests.report.folders import make_run, make_sweep, write_row


def notes(folder: Path) -> str:
    return "\n".join(read_run(folder).notes())


def test_of_a_step_done_again_the_newest_counts(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=6)
    load_LE = np.full((4, 8), 512)
    for step in (5, 6):
        write_row(run, step, load_LE, 0.0, replayed=True)
    write_row(run, 7, load_LE, 0.0)
    read = read_run(run)
    assert [row["train/step"] for row in read.rows] == [1, 2, 3, 4, 5, 6, 7] and read.replayed == (5, 6)
    assert read.rows[4]["moe/max_vio"] == 0 and read.rows[3]["moe/max_vio"] > 0
    assert read.experts.steps == (1, 2, 3, 4, 5, 6, 7) and (read.experts.at(5)["load"] == 512).all()
    assert "Steps 5 to 6 were done again" in notes(run)


def test_half_a_row_and_half_a_frame_are_passed_over(tmp_path: Path):
    run = make_run(tmp_path / "run", num_steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 4, "train/lo')
    whole = (run / "experts.bin").read_bytes()
    (run / "experts.bin").write_bytes(whole + whole[: len(whole) // 4])
    read = read_run(run)
    assert read.step == 3 and read.experts.steps == (1, 2, 3)


def test_notes_say_what_is_missing(tmp_path: Path):
    assert notes(make_run(tmp_path / "whole")) == ""
    assert "has recorded no log step" in notes(make_run(tmp_path / "none", num_steps=0))
    assert "no experts" in notes(make_run(tmp_path / "dense", num_layers=0))
    lost = make_run(tmp_path / "lost")
    (lost / "experts.bin").unlink()
    assert "no experts.bin" in notes(lost)
    old = make_run(tmp_path / "old", num_layers=0)
    write_row(old, 41, None, 1.0, **{"moe/drop_rate": 0.1, "moe/layer_00/load": [1, 2]})
    assert "earlier version" in notes(old)
    sick = make_run(tmp_path / "sick", ended="nonfinite", message="The loss is NaN.")
    write_row(sick, 41, None, 1.0, **{"train/loss": "NaN"})
    assert "The loss is NaN." in notes(sick) and "train/loss was not finite once, first at step 41" in notes(sick)
    assert read_run(sick).last("train/loss") is not None
    (lost / "config.yaml").write_text("{")
    assert "config.yaml cannot be read" in notes(lost) and read_run(lost).name == "lost"


def test_states(tmp_path: Path):
    run = make_run(tmp_path / "run", ended=None)
    assert state_of(run) == "stale"
    with (run / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert state_of(run) == "running"
    for reason, state in (("done", "done"), ("preempted", "stopped"), ("bug", "failed")):
        write_status(run, reason, "")
        assert state_of(run) == state
    (run / "status.json").unlink()
    (run / LOCK).write_text(json.dumps({"host": "a.b.c", "pid": 1, "since": ""}))
    born = (run / "metrics.jsonl").stat().st_mtime
    assert state_of(run, born + HEARTBEAT_S - 1) == "running" and state_of(run, born + HEARTBEAT_S + 1) == "stale"


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    for folder, problem in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(ConfigError, match=f"{problem}.*moedist runs"):
            read_run(folder)


def test_a_sweep_is_its_runs(tmp_path: Path):
    sweep = make_sweep(tmp_path / "sweep", num_jobs=2)
    (found,) = expand([sweep])[1]
    assert found.keys == ("moe.router.top_k",) and found.absent == (
        "Job 002 is failed, without a run: no job of it ran",
    )
    runs, _ = expand([sweep / "001", sweep])
    assert runs == [sweep / "001", sweep / "000"]
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a sweep\.json that cannot be read"):
        expand([sweep])
