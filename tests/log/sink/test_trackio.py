from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sqlite3
import sys

import pytest

from moedist.config import ConfigError, to_mapping
from moedist.launch.folder import claim_folder
from moedist.log.sink.jsonl import JsonlConfig
from moedist.log.sink.trackio import TrackioConfig
from moedist.mesh import Mesh
from moedist.train.run import run_rank
from tests.log.sink.records import record
from tests.rows import flat, read_rows
from tests.train.tiny import CONFIG, changed, in_folder, no_measuring


@pytest.fixture(autouse=True)
def own_database(monkeypatch, tmp_path):
    """Trackio takes the folder of its database when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def log_steps(run_info, *steps: int) -> list[str]:
    said: list[str] = []
    sink = TrackioConfig(dir=str(run_info.directory / "trackio")).open(run_info, said.append)
    for step in steps:
        sink.write(record(step))
    sink.alert("the run stalls", "No record.")
    sink.close("done")
    return said


def read(run_info) -> list[dict]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs("moedist", f"{run_info.name}-{run_info.run_id}")


@pytest.mark.pitfall("34")
def test_the_database_holds_every_number_and_no_step_twice(run_info, capsys):
    (line,) = log_steps(run_info, 10, 20)
    assert "trackio show --project moedist" in line and capsys.readouterr().out == ""
    log_steps(dataclasses.replace(run_info, resumed_step=10), 20, 30)
    rows = read(run_info)
    assert [row["train/step"] for row in rows] == [row["step"] for row in rows] == [10, 20, 30]
    for key, value in flat(record(30)).items():
        if isinstance(value, list) and key != "moe/layers/block":
            assert rows[-1][key]["values"] == value and rows[-1][key]["bins"] == [0, 1, 2, 3, 4]
        elif key != "moe/layers/block":
            assert rows[-1][key] == pytest.approx(value), key


@pytest.mark.pitfall("34")
def test_what_a_killed_process_did_not_send_is_sent_by_the_next_one(run_info):
    lines = JsonlConfig().open(run_info, print)
    for step in (10, 20):
        lines.write(record(step))
    lines.close("failed")
    log_steps(run_info, 10)
    log_steps(dataclasses.replace(run_info, resumed_step=20), 30)
    rows = read(run_info)
    assert [row["train/step"] for row in rows] == [row["step"] for row in rows] == [10, 20, 30]
    assert rows[1].keys() == rows[2].keys()


def test_the_file_itself_holds_what_the_run_said(tmp_path):
    """A whole run, and its database opened by nothing of Trackio's."""
    sinks = {"jsonl": JsonlConfig(), "trackio": TrackioConfig(dir=str(tmp_path / "trackio"))}
    config = in_folder(
        changed(CONFIG, train={"steps": 3, "checkpoint_every": None}, log={"sinks": sinks}), tmp_path / "run"
    )
    claim = claim_folder(config.run, to_mapping(config))
    try:
        with no_measuring():
            assert run_rank(config, claim.path, Mesh.alone(), io.StringIO()) == 0
    finally:
        claim.release()
    with contextlib.closing(sqlite3.connect(f"file:{tmp_path}/trackio/moedist.db?mode=ro", uri=True)) as database:
        logged = database.execute("select step, metrics from metrics order by id").fetchall()
        ((saved,),) = database.execute("select config from configs").fetchall()
        assert database.execute("select count(*) from system_metrics").fetchone() == (0,), "nobody asked for them"
    found = [(step, json.loads(text)) for step, text in logged]
    said = read_rows(claim.path)
    assert [step for step, _ in found] == [row["train/step"] for row in said] == [1, 2, 3]
    for (_, row), own in zip(found, said, strict=True):
        for key, value in own.items():
            if key == "moe/layers/block":  # which is in the names of the series
                continue
            held = row[key]["values"] if isinstance(value, list) else row[key]
            assert held == pytest.approx(value, rel=1e-5), key  # there in six digits
    assert json.loads(saved)["moe"]["num_experts"] == 8 and "torch" in json.loads(saved)["environment"]["packages"]


def test_columns_without_room_are_tables(run_info):
    few = dataclasses.replace(run_info, max_scalar_keys=0)
    log_steps(few, 10, 20)
    last = read(few)[-1]
    assert last["moe/layers/max_vio"]["_type"] == "trackio.table" and "train/step" not in last


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package trackio.+pip install 'moedist\[trackio\]'"):
        TrackioConfig().check()
