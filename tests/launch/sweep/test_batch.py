"""Jobs are admitted, started, watched and remembered; who asks for them is no sweeper, and none runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobStatus

from moedist.launch.compose import Composed, compose, compose_onto
from moedist.launch.sweep.batch import Batches, JobFailed, SweepStopped
from moedist.launch.sweep.record import SweepRecord
from moedist.launch.sweep.settings import SweepConfig
from moedist.train.status import Status
from tests.launch.sweep.stage import DONE, QUICK, Stage, losses

GOES_WELL = (losses(0.1), DONE)
FAILS = ([], Status("bug", 5, "A NaN.\nIn layer 3.", rank=1))


@pytest.fixture(scope="module")
def base() -> Composed:
    return compose([*QUICK, "log/sink=[jsonl]"])


@pytest.fixture
def start(base: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Batches]:
    """A start of the sweep in the test's folder, which finds what earlier ones left there."""
    monkeypatch.setattr("moedist.launch.sweep.batch.POLL_S", 0.0)
    monkeypatch.setattr("moedist.launch.sweep.batch.compose", lambda given: compose_onto(base.mapping, given))

    def start(stage: Stage, settings: SweepConfig | None = None, **changes: object) -> Batches:
        settings = settings or SweepConfig()
        record = SweepRecord.read(tmp_path) or SweepRecord(tmp_path, [], list(settings.terms))
        given = {
            "known": {"train.steps=40"},
            "signals": SimpleNamespace(count=0, interrupts=0),
            "judges": True,
            "bears_failures": True,
            **changes,
        }
        return Batches(record=record, settings=settings, place=stage, fixed=["train.steps=40"], say=print, **given)

    return start


def seeds(*values: int) -> list[list[str]]:
    """A batch as sweepers ask for it."""
    return [["train.steps=40", f"seed={value}"] for value in values]


def states(batches: Batches) -> list[str]:
    return [job.state for job in batches.record.jobs]


def of_seed(script: dict[int, tuple[Sequence[dict], Status]], default=GOES_WELL) -> Stage:
    return Stage(lambda job: script.get(job.composed.config.seed, default))


def test_a_failing_job_is_remembered_and_the_next_start_runs_it_alone(start: Callable[..., Batches], tmp_path: Path):
    stage = of_seed({2: FAILS})
    batches = start(stage)
    results = batches.run(seeds(1, 2, 3))
    assert [result.status for result in results] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert results[0].return_value == 0.1
    with pytest.raises(JobFailed, match="A NaN"):
        _ = results[1].return_value
    assert states(batches) == ["COMPLETED", "FAILED", "COMPLETED"] and batches.record.exit_code == 5
    log = tmp_path / "001" / "logs" / "rank_1.log"
    assert f"001: FAILED with exit code 5: A NaN. In layer 3. See {log}." in list(batches.record.table())
    assert {job.composed.config.train.steps for job in stage.started} == {40}

    stage = of_seed({1: (losses(9.9), DONE)})
    batches = start(stage)
    assert [result.return_value for result in batches.run(seeds(1, 2, 4, 4))] == [0.1, 0.1, 0.1, 0.1]
    assert [job.composed.config.seed for job in stage.started] == [2, 4], "finished jobs run again, or one runs twice"
    assert [job.composed.config.run.resume for job in stage.started] == ["auto", "never"]
    assert [job.run_dir.name for job in stage.started] == ["001", "003"]
    assert batches.record.exit_code == 0
    assert start(of_seed({})).run([["train.steps=50", "seed=1"]]) and len(start(stage).record.jobs) == 5


def test_a_sweeper_that_bears_no_failures_hears_of_none(start: Callable[..., Batches]):
    (result,) = start(of_seed({1: FAILS}), bears_failures=False).run(seeds(1))
    assert result.status == JobStatus.COMPLETED and result.return_value != result.return_value


def test_several_objectives_are_returned_together(start: Callable[..., Batches]):
    settings = SweepConfig(objective=("eval/loss", {"eval/loss": 1.0, "moe/max_vio": 0.5}))
    rows = [{"train/step": 10, "eval/loss": 2.0, "moe/max_vio": 3.0}]
    (result,) = start(of_seed({}, (rows, DONE)), settings).run(seeds(1))
    assert result.return_value == (2.0, 3.5)


def test_hopeless_jobs_end_as_pruned(start: Callable[..., Batches]):
    stage = Stage(lambda job: (losses(*[job.composed.config.seed + 1.0 - i / 10 for i in range(4)]), DONE), size=1)
    batches = start(stage, SweepConfig(prune_after_jobs=2, prune_after_steps=10))
    results = batches.run(seeds(1, 2, 3, 0))
    assert states(batches) == ["COMPLETED", "COMPLETED", "PRUNED", "COMPLETED"] and batches.record.exit_code == 0
    assert batches.record.jobs[2].message == "Hopeless at step 20: 3.9, and the median is 2.4."
    assert results[2].return_value == 3.9, "the last that it measured"
    assert start(stage, SweepConfig(prune_after_jobs=2)).run(seeds(3))[0].return_value == 3.9
    assert len(stage.started) == 4, "a pruned job ran again"


def test_a_stopped_sweep_starts_nothing_more_and_goes_on_later(start: Callable[..., Batches]):
    stage = of_seed({})
    stage.size = 1
    batches = start(stage)
    batches.signals = type("Signals", (), {"interrupts": 0, "count": property(lambda self: len(stage.started))})()
    with pytest.raises(SweepStopped):
        batches.run(seeds(1, 2))
    assert states(batches) == ["STOPPED", "WAITING"] and batches.record.exit_code == 75 and stage.room == []
    batches = start(stage)
    batches.run(seeds(1, 2))
    assert states(batches) == ["COMPLETED", "COMPLETED"]
    assert [job.composed.config.run.resume for job in stage.started] == ["never", "auto", "never"]


def test_a_signal_that_finds_all_done_stops_the_next_batch(start: Callable[..., Batches]):
    batches = start(of_seed({}))
    come = property(lambda self: int("COMPLETED" in states(batches)))
    batches.signals = type("Signals", (), {"interrupts": 0, "count": come})()
    assert len(batches.run(seeds(1))) == 1
    with pytest.raises(SweepStopped):
        batches.run(seeds(2))
    assert states(batches) == ["COMPLETED", "WAITING"] and batches.record.exit_code == 75


def test_what_must_be_measured_is_checked_where_it_matters(start: Callable[..., Batches]):
    blind = [["train.eval_every=null"]]
    batches = start(of_seed({}))
    batches.run(blind)
    assert states(batches) == ["FAILED"] and "measures no hydra.launcher.objective" in batches.record.jobs[0].message
    batches = start(of_seed({}), judges=False)
    batches.run(blind)
    assert states(batches) == ["COMPLETED"], "a grid needs no objective"
