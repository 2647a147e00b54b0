from __future__ import annotations

import dataclasses
import io

import pytest

from moedist.config import ConfigError
from moedist.log.sink.jsonl import JsonlConfig
from moedist.log.sink.tensorboard import TensorboardConfig
from tests.log.sink.records import record
from tests.rows import flat


def log_steps(run_info, *steps: int) -> list[str]:
    said: list[str] = []
    sink = TensorboardConfig().open(run_info, said.append)
    for step in steps:
        sink.write(record(step))
    sink.close("done")
    return said


def read(run_info):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_info.directory / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def test_event_files_hold_every_number_and_a_bar_per_expert(run_info):
    assert log_steps(run_info, 10, 20) == []
    events = read(run_info)
    expected = {key: value for key, value in flat(record(20)).items() if not isinstance(value, list)}
    got = {key: events.Scalars(key)[-1] for key in expected}
    assert {key: event.value for key, event in got.items()} == pytest.approx(expected, rel=1e-6)
    assert {event.step for event in got.values()} == {20}
    (_, load) = events.Histograms("moe/layer_01/load")
    assert load.histogram_value.bucket == [5, 2, 1, 0] and load.histogram_value.bucket_limit == [1, 2, 3, 4]


@pytest.mark.pitfall("34")
def test_a_resumed_run_writes_no_step_twice(run_info):
    log_steps(run_info, 10, 20, 30)
    log_steps(dataclasses.replace(run_info, resumed_step=10), 20, 30, 40)
    assert [event.step for event in read(run_info).Scalars("train/loss")] == [10, 20, 30, 40]


@pytest.mark.pitfall("34")
def test_what_a_killed_process_did_not_write_is_written_by_the_next_one(run_info):
    lines = JsonlConfig().open(run_info, print)
    for step in (10, 20):
        lines.write(record(step))
    lines.close("failed")
    log_steps(run_info, 10)
    log_steps(dataclasses.replace(run_info, resumed_step=20), 30)
    events = read(run_info)
    for series in (events.Scalars("train/loss"), events.Histograms("moe/layer_01/load")):
        assert [event.step for event in series] == [10, 20, 30]


def test_what_it_has_no_room_for_is_told_of_once(run_info):
    (line,) = log_steps(dataclasses.replace(run_info, max_scalar_keys=0, terminal=io.StringIO()), 1, 2)
    assert "14 quantities" in line and "log.max_scalar_keys" in line


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard.+pip install 'moedist\[tensorboard\]'"):
        TensorboardConfig().check()
