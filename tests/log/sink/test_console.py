from __future__ import annotations

import dataclasses
import os
import pty

import pytest

from moedist.log.sink.console import ConsoleConfig, ConsoleSink, log_line

RECORD = {
    "train/step": 20,
    "train/loss": 2.34567,
    "train/lr_router": 1e-4,
    "train/lr_experts": 2e-3,
    "train/grad_norm": 1.234,
    "train/tokens_per_s": 12345.6,
    "moe/max_vio": 0.4242,
    "moe/drop_rate": 0.0312,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_step_is_one_line():
    assert log_line(RECORD, 1000, 245.0) == (
        "step   20/1000  loss  2.3457  MaxVio 0.42  drop  3.1%  norm 1.23  lr 2.0e-3  12.3k tok/s  ETA 4:05"
    )


def test_a_dense_model_shows_no_moe_fields():
    dense = {key: value for key, value in RECORD.items() if not key.startswith("moe/")}
    assert log_line(dense, 1000, None) == "step   20/1000  loss  2.3457  norm 1.23  lr 2.0e-3  12.3k tok/s  ETA --:--"


@pytest.mark.parametrize(
    "extreme",
    [
        {"train/step": 500_000, "train/loss": 11.0},
        {"moe/max_vio": 127.0, "moe/drop_rate": 0.992, "train/grad_norm": 123456.0},
        {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/tokens_per_s": 1.234e8},
        {"train/tokens_per_s": 0.4, "train/grad_norm": 9.999, "moe/max_vio": 99.99, "train/lr_experts": 9e-12},
    ],
)
def test_a_line_fits_100_columns_at_any_size(extreme):
    for eta_s in (None, 0.0, 3599.6, 86399.0, 30 * 86400.0):
        assert len(log_line(RECORD | extreme, 500_000, eta_s)) <= 100


def test_the_time_left_is_the_mean_pace_since_the_first_record(run_info):
    clock = Clock()
    sink = ConsoleSink(dataclasses.replace(run_info, resumed_step=100), clock)
    for step, now in ((110, 50.0), (120, 60.0), (130, 70.0)):  # the first 10 steps took 50 s, then a second each
        clock.now = now
        sink.write(RECORD | {"train/step": step})
    etas = [line.rpartition("ETA ")[2] for line in run_info.terminal.getvalue().splitlines()]
    assert etas == ["1h14m", "14:40", "14:30"]


def test_a_stream_that_is_no_terminal_gets_plain_lines(run_info):
    sink = ConsoleConfig().open(run_info, print)
    sink.say("a yardstick: [2.42]")
    sink.write(RECORD | {"eval/loss": 2.1})
    sink.close("done")
    lines = run_info.terminal.getvalue().splitlines()
    assert lines[0] == "a yardstick: [2.42]"
    assert lines[1].startswith("step   20/1000  loss  2.3457")
    assert lines[2:] == ["step   20/1000  held-out loss 2.1000"]
    assert "\x1b" not in run_info.terminal.getvalue()


@pytest.mark.parametrize(("term", "live"), [("xterm", True), ("dumb", False)])
def test_a_terminal_gets_a_live_bar_below_the_same_lines(run_info, monkeypatch, term, live):
    monkeypatch.setenv("TERM", term)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        sink = ConsoleConfig().open(dataclasses.replace(run_info, terminal=terminal), print)
        sink.say("hello")
        sink.write(RECORD)
        sink.close("done")
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert b"hello" in shown and b"MaxVio 0.42" in shown
    assert (b"\x1b[" in shown and b"20/1000" in shown and "━".encode() in shown) == live
