"""Hydra's own multirun in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedist.cli.main import main
from moedist.config import ConfigError
from moedist.launch.sweep.batch import Batches
from moedist.launch.sweep.record import JobRecord
from moedist.launch.sweep.sweep import run_sweep
from moedist.launch.sweep.torchrun import TorchrunConfig
from tests.launch.sweep.stage import DONE, QUICK, Stage, losses

Output = pytest.CaptureFixture[str]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(lambda job: (losses(job.composed.config.mesh.ep / 10), DONE))
    monkeypatch.setattr(TorchrunConfig, "open", lambda self: stage)
    monkeypatch.setattr("moedist.launch.sweep.batch.POLL_S", 0.0)
    return stage


def test_a_grid_runs_and_a_bad_job_fails_alone(tmp_path: Path, stage: Stage, capsys: Output):
    folder = tmp_path / "sweep"
    argv = ["train", "-m", "--json", *QUICK, f"run.dir={folder}", "~moe.balance.z_loss", "seed=7", "mesh.ep=2,3"]
    assert main(argv) == 2
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "sweep.json").read_text())
    assert [job["overrides"] for job in told["jobs"]] == [["mesh.ep=2"], ["mesh.ep=3"]]
    assert [(job["state"], job["values"]) for job in told["jobs"]] == [("COMPLETED", [0.2]), ("FAILED", None)]
    assert "mesh.ep = 3 does not divide the 2 ranks" in told["jobs"][1]["message"]
    (job,) = stage.started
    assert job.composed.config.seed == 7 and set(job.composed.config.moe.balance) == {"switch"}
    assert (job.run_dir / "config.yaml").is_file() and job.run_dir.parent == folder
    assert main(["train", "-m", *QUICK, f"run.dir={folder}", "mesh.ep=2,3"]) == 2
    assert "holds a sweep already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hydra/launcher=basic", "hydra/launcher = 'basic' starts no ranks. Choose one of torchrun"),
        ("hydra.launcher.ranks_per_job=0", "hydra.launcher.ranks_per_job = 0 is not a number of ranks"),
        ("run.dir=a,b", "a sweep has one"),
        ("run.resume=runs/first", "run.resume = 'runs/first' names one run, and a sweep makes many"),
    ],
)
def test_what_is_wrong_with_the_sweep_itself(override: str, words: str, tmp_path: Path, stage: Stage):
    with pytest.raises(ConfigError) as caught:
        run_sweep([*QUICK, f"run.dir={tmp_path / 'sweep'}", override])
    assert words in str(caught.value)
    assert not stage.started and not (tmp_path / "sweep").exists()


def test_a_sweep_goes_on_where_it_is_told_to(stage: Stage):
    with pytest.raises(ConfigError, match="run.resume = 'auto' needs a folder to come back to"):
        run_sweep([*QUICK, "run.resume=auto"])


def test_a_sweeper_that_fails_midway_is_no_success(
    tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    def fail(batches: Batches, record: JobRecord) -> None:
        raise RuntimeError("the study is gone")

    monkeypatch.setattr(Batches, "_result", fail)
    assert main(["train", "-m", *QUICK, f"run.dir={tmp_path / 'sweep'}", "mesh.ep=2"]) == 2
    assert "The sweeper ended with RuntimeError: the study is gone" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"][0]["state"] == "COMPLETED"


def test_flags_that_show_one_run_do_not_go_with_many(capsys: Output):
    assert main(["train", "-m", "--dry-run", "seed=1,2"]) == 2
    assert "--dry-run = True shows one run, and -m makes many" in capsys.readouterr().err
