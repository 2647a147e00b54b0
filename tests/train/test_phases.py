"""Who waited for whom: by hand, and in steps of real ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moedist.log.config import PhasesConfig
from moedist.train.phases import Span, Straggler, chrome_trace, find_straggler
from tests.ranks import Here
from tests.train.tiny import CONFIG, changed, make_trainer

LATE_S = 1000.0
"""More than any real wait."""


def rank(exchange_s: float, agree_s: float = 1.0) -> list[Span]:
    """A forward phase from the agreement to 9.0 s, with one exchange."""
    return [
        Span("data", 0.0, agree_s),
        Span("agree", agree_s, 2.0),
        Span("forward", 2.0, 9.0),
        Span("exchange", exchange_s, 7.0, within="forward"),
        Span("optimizer", 9.0, 10.0),
    ]


def test_the_last_to_arrive_is_named_with_what_it_did():
    ranks = [rank(3.0), rank(5.0), rank(6.0), rank(3.5)]
    assert find_straggler(ranks, ep=4) == Straggler(2, "forward", 3 + 1 + 2.5, 1.0)
    # in two groups, ranks 0 and 1 do not wait for ranks 2 and 3
    assert find_straggler(ranks, ep=2) == Straggler(2, "forward", 2.5, 2.5 / 4.5)
    slow_data = [rank(3.0), rank(3.0, agree_s=1.75)]
    assert find_straggler(slow_data, ep=2) == Straggler(1, "data", 0.75, 1.0)
    assert find_straggler([rank(3.0), rank(3.0)], ep=2) is None


def test_a_trace_is_what_perfetto_reads():
    trace = chrome_trace([rank(3.0), rank(5.0)], 12, find_straggler([rank(3.0), rank(5.0)], ep=2))
    events = trace["traceEvents"]
    names = {(event["name"], event["pid"]): event["args"].get("name") for event in events if event["ph"] == "M"}
    assert names["process_name", 0] == "rank 0" and names["process_name", 1] == "rank 1 (waited for in forward)"
    assert names["thread_name", 0] == names["thread_name", 1] == "phases"
    (exchange,) = (event for event in events if event["pid"] == 1 and event["name"] == "exchange")
    assert exchange == {"name": "exchange", "cat": "exchange", "ph": "X", "pid": 1, "tid": 0, "ts": 5e6, "dur": 2e6}
    assert trace["otherData"] == {
        "step": 12,
        "straggler": {"rank": 1, "phase": "forward", "waited_s": 2.0, "share": 1.0},
    }


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def recorded(here: Here, folder: Path) -> dict[str, Any]:
    """Two steps, the second recorded; rank 1 is late in its backward, by its clock."""
    config = changed(CONFIG, log={"phases": PhasesConfig(steps=(2,))})
    trainer = make_trainer(config, config.data.open(), here.mesh_of(2), traces=folder)
    loader, log = trainer.loader(), Said()
    assert trainer.step(loader) and not trainer.phases.on
    backward, late_s = trainer.engine.backward, 0.0
    trainer.phases._clock = lambda: time.perf_counter() + late_s

    def late(*args: Any, **kwargs: Any) -> None:
        nonlocal late_s
        late_s = LATE_S * here.rank
        backward(*args, **kwargs)

    trainer.engine.backward = late  # type: ignore[method-assign]
    trainer.phases.begin()
    assert trainer.step(loader)
    trainer.write_phases(log)  # type: ignore[arg-type]
    assert not trainer.phases.on
    return {"lines": log.lines}


@pytest.mark.slow
def test_ranks_name_the_one_that_was_late(ranks, tmp_path: Path):
    said, silent = ranks(2).run(recorded, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "phases_00000002.json" and silent == {"lines": []}
    trace = json.loads(path.read_text())
    straggler = trace["otherData"]["straggler"]
    assert (straggler["rank"], straggler["phase"]) == (1, "backward") and straggler["waited_s"] > LATE_S / 2
    assert said["lines"][0].startswith(f"phases {path}: the others waited") and "rank 1 in backward" in said["lines"][0]
    for pid in (0, 1):
        spans = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == pid]
        phases = [event["name"] for event in spans if event["cat"] == "phase"]
        assert phases == ["data", "agree", "forward", "backward", "optimizer"]
        within = [event for event in spans if event["cat"] == "exchange"]
        assert len(within) >= 2 * 2 * 2, "two layers, there and back, forward and backward"
        for exchange in within:
            assert any(
                phase["ts"] <= exchange["ts"] and exchange["ts"] + exchange["dur"] <= phase["ts"] + phase["dur"]
                for phase in spans
                if phase["cat"] == "phase"
            )


@pytest.mark.parametrize("step, wanted", [(1, False), (2, True), (4, True)])
def test_chosen_steps(step: int, wanted: bool):
    assert PhasesConfig(steps=(4,), every=2).wants(step) == wanted and PhasesConfig(steps=(4,)).on
