from __future__ import annotations

import dataclasses

from moedist.log.config import LogConfig
from moedist.log.run_log import RunLog
from moedist.log.sink.contract import Sink, SinkConfig


@dataclasses.dataclass(frozen=True)
class NotesConfig(SinkConfig, Sink):
    """Notes what it gets; raises at the calls named in ``broken``."""

    notes: list
    broken: tuple[str, ...] = ()

    def open(self, run, say):
        self.note("open")
        return self

    def write(self, record):
        self.note("write", record["train/step"])

    def say(self, line):
        self.note("say", line)

    def close(self, status):
        self.note("close", status)

    def note(self, call, *args):
        if call in self.broken:
            raise OSError(f"{call} is broken")
        self.notes.append((call, *args))


def open_log(run_info, rank=0, **sinks):
    return RunLog(LogConfig(sinks=sinks), run_info, rank)


def test_every_sink_gets_everything_in_order(run_info):
    a, b = NotesConfig([]), NotesConfig([])
    log = open_log(run_info, a=a, b=b)
    log.say("hello")
    log.write({"train/step": 1})
    log.close("done")
    log.close("failed")
    assert a.notes == b.notes == [("open",), ("say", "hello"), ("write", 1), ("close", "done")]


def test_other_ranks_open_nothing(run_info):
    sink = NotesConfig([])
    log = open_log(run_info, rank=1, sink=sink)
    log.say("hello")
    log.write({"train/step": 1})
    log.close("done")
    assert sink.notes == []


def test_a_sink_that_does_not_open_leaves_the_others_alone(run_info):
    good, bad = NotesConfig([]), NotesConfig([], broken=("open",))
    log = open_log(run_info, good=good, bad=bad)
    log.write({"train/step": 1})
    log.close("done")
    (warning,) = [line for call, line in good.notes[1:] if call == "say"]
    assert "log.sinks.bad" in warning and "open is broken" in warning
    assert ("write", 1) in good.notes and bad.notes == []


def test_a_failing_sink_is_told_of_once_and_does_not_stop_the_others(run_info):
    bad, good = NotesConfig([], broken=("write", "say", "close")), NotesConfig([])
    log = open_log(run_info, bad=bad, good=good)
    for step in (1, 2, 3):
        log.write({"train/step": step})
    log.close("done")
    assert [note for note in good.notes if note[0] == "write"] == [("write", 1), ("write", 2), ("write", 3)]
    assert sum(note[0] == "say" for note in good.notes) == 1
    assert good.notes[-1] == ("close", "done")


def test_alerts_and_checkpoints_reach_the_sinks_that_have_a_use_for_them(run_info, tmp_path):
    heard = []

    class Listening(NotesConfig):
        def alert(self, title, text):
            heard.append((title, text))

        def saved(self, step, checkpoint):
            heard.append((step, checkpoint))

    log = open_log(run_info, deaf=NotesConfig([]), listening=Listening([]))
    log.write({"train/step": 1, "train/loss": float("nan")})
    log.write({"train/step": 2, "train/loss": float("nan")})
    log.saved(2, tmp_path)
    log.close("failed")
    assert heard == [("a number is none", "train/loss is nan at step 1."), (2, tmp_path)]
