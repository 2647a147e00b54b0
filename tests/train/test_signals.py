"""Signals are noted, and nothing else: whatever runs goes on, a save above all."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from moedist.mesh import Axis
from moedist.train.checkpoint import CheckpointStore, shards, verify
from moedist.train.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_the_first_one_counts(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested and stop.first is None
        signal.raise_signal(number)
        assert stop.requested and stop.first is number
        for other in SIGNALS:
            signal.raise_signal(other)
        assert stop.first is number


def test_the_handlers_before_are_restored() -> None:
    heard = []
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in SIGNALS}
    try:
        with pytest.raises(KeyError), StopRequest() as stop:
            raise KeyError
        for number in SIGNALS:
            signal.raise_signal(number)
        assert heard == list(SIGNALS) and not stop.requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signals_in_the_middle_of_a_save_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = shards.FileSeal.of
    monkeypatch.setattr(
        shards.FileSeal, "of", lambda path: [signal.raise_signal(number) for number in SIGNALS] and seal(path)
    )
    with StopRequest() as stop:
        path = CheckpointStore(tmp_path, Axis("slow")).save(1, {"model": {"w": torch.ones(3)}}, {})
    assert stop.first is SIGNALS[0]
    monkeypatch.undo()
    assert verify(path).step == 1
