from __future__ import annotations

import math

import pytest

from moedist.config import ConfigError
from moedist.log.alerts import AlertConfig, Alerts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(step: int = 200, **values: float) -> dict:
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return {"train/step": step, "train/loss": 2.0, "moe/load_entropy": 0.9, "moe/drop_rate": 0.1} | named


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({}, []),
        ({"train_loss": math.nan}, ["nan"]),
        ({"eval_loss": math.inf, "moe_drop_rate": 0.6}, ["nan", "drops"]),
        ({"moe_load_entropy": 0.4}, ["collapse"]),
        ({"step": 100, "moe_load_entropy": 0.4, "moe_drop_rate": 0.6}, []),
    ],
)
def test_a_sick_record_is_told_of_after_the_warm_up(values, kinds):
    assert [alert.kind for alert in Alerts(AlertConfig()).of(record(**values))] == kinds


def test_a_kind_is_told_of_once_in_a_while():
    clock = Clock()
    alerts = Alerts(AlertConfig(every_s=100), clock)
    told = []
    for clock.now in range(0, 250, 10):
        told += [(clock.now, alert.kind) for alert in alerts.of(record(moe_drop_rate=0.9))]
    assert told == [(0, "drops"), (100, "drops"), (200, "drops")]


def test_silence_is_told_of_once_and_measured_by_the_pace_of_the_run():
    clock = Clock()
    alerts = Alerts(AlertConfig(stall_s=60), clock)
    for clock.now in (0, 5, 35):
        alerts.of(record())
    clock.now = 35 + 149
    assert alerts.silence() is None, "less than five times the longest gap"
    clock.now = 35 + 150
    assert "150 s after step 200" in alerts.silence().text
    assert alerts.silence() is None


def test_limits_can_be_off():
    config = AlertConfig(drop_rate=None, load_entropy=None, stall_s=None)
    clock = Clock()
    alerts = Alerts(config, clock)
    assert alerts.of(record(moe_drop_rate=1.0, moe_load_entropy=0.0)) == []
    clock.now = 1e6
    assert alerts.silence() is None
    with pytest.raises(ConfigError, match="drop_rate = 2"):
        AlertConfig(drop_rate=2)
