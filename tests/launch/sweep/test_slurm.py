"""Jobs of a sweep as jobs of SLURM: its answers are played, and then a cluster on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from moedist.config import ConfigError
from moedist.launch.sweep import slurm
from moedist.launch.sweep.record import JobRecord
from moedist.train.status import write_status
from tests.end_to_end.runs import TINY
from tests.launch.namespaces import ROOT, environment
from tests.launch.slurm import Slurm, why_not
from tests.launch.slurm import slurm as make_cluster


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[str]], dict[str, str]]:
    """What SLURM was asked, and what it says to each command; nothing is an error."""
    calls: list[list[str]] = []
    says = {"sbatch": "17;cluster", "squeue": "RUNNING", "scontrol": "", "scancel": ""}

    def ask(command: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        said = says[command[0]]
        gone = said == "gone"
        return subprocess.CompletedProcess(command, int(gone), said, "slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(slurm, "_ask", ask)
    monkeypatch.setattr(slurm, "LOOK_S", 0.0)
    return calls, says


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    def make(nproc: int | None = 8, place: str = "") -> SimpleNamespace:
        launch = SimpleNamespace(nproc=nproc, nnodes=2)
        composed = SimpleNamespace(config=SimpleNamespace(launch=launch))
        words = ["launch.nnodes=2", "launch.rendezvous=slurm", "launch.nproc=8", "seed=3"]
        record = JobRecord(0, ["seed=3"], "", "000", place=place)
        (tmp_path / "sweep" / "000").mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(record=record, composed=composed, overrides=words, run_dir=tmp_path / "sweep" / "000")

    return make


PLACE = slurm.Slurm("launch/slurm.sbatch", ["--time=4:00:00"])


def test_a_job_is_submitted_watched_and_stopped(asked, make_job):
    calls, says = asked
    job = make_job()
    running = PLACE.start(job)
    folder = job.run_dir
    assert calls.pop() == [
        *("sbatch", "--parsable", "--job-name=sweep-000", "--nodes=2", f"--output={folder}.out", "--time=4:00:00"),
        *("launch/slurm.sbatch", "launch.nproc=8", "seed=3", f"run.dir={folder}"),
    ], "the script alone says how many nodes meet where"
    assert job.record.place == "SLURM job 17"
    assert running.poll() is None
    running.stop()
    running.stop()
    assert calls[-3:] == [
        ["scontrol", "update", "JobId=17", "Requeue=0"],
        ["squeue", "--noheader", "--jobs=17", "--format=%T"],
        ["scancel", "--signal=USR1", "--batch", "17"],
    ]
    write_status(folder, "preempted", "Saved.", step=3)
    says["squeue"] = "gone"
    assert running.poll().step == 3
    running.close()
    assert calls[-1][0] == "squeue", "an ended job was cancelled"


def test_a_job_that_says_nothing_ends_all_the_same(asked, make_job):
    _, says = asked
    running = PLACE.start(make_job())
    says |= {"squeue": "gone", "scontrol": "JobId=17 JobState=FAILED Reason=None ExitCode=2:0"}
    status = running.poll()
    assert (status.reason, status.exit_code) == ("config", 2) and "SLURM job 17 ended (FAILED)" in status.message
    assert running.log.name == "000.out"


def test_a_job_that_outlived_its_sweep_is_found_again(asked, make_job):
    calls, says = asked
    PLACE.start(make_job(place="SLURM job 12"))
    assert [call[0] for call in calls] == ["squeue"], "it was submitted twice"
    says["squeue"] = "gone"
    PLACE.start(make_job(place="SLURM job 12"))
    assert calls[-1][0] == "sbatch"


def test_what_it_said_while_its_sweep_was_gone_is_heard(asked, make_job):
    job = make_job(place="SLURM job 12")
    write_status(job.run_dir, "done", "All steps done.")
    asked[1]["squeue"] = "COMPLETING"
    running = PLACE.start(job)
    asked[1]["squeue"] = "gone"
    assert running.poll().reason == "done"


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING"])
def test_a_job_that_has_not_begun_is_cancelled(state: str, asked, make_job):
    calls, says = asked
    running = PLACE.start(make_job())
    says["squeue"] = state
    running.stop()
    assert calls[-1] == ["scancel", "17"], "there is nobody yet to hear a signal"


def test_silence_is_bounded(asked, make_job, monkeypatch: pytest.MonkeyPatch):
    running = PLACE.start(make_job())
    monkeypatch.setattr(slurm, "SILENCE_S", -1.0)
    monkeypatch.setattr(slurm, "_state", lambda number: None)
    assert running.poll().reason == "io"


def test_what_a_cluster_must_be_told(asked, make_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="leaves open how many ranks a node"):
        PLACE.start(make_job(nproc=None))
    asked[1]["sbatch"] = "gone"
    with pytest.raises(ConfigError, match="could not submit"):
        PLACE.start(make_job())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="launch/slurm.sbatch' is no file here"):
        slurm.SlurmConfig().open()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        with make_cluster(Path(folder)) as made:
            yield made


@pytest.mark.slow
def test_two_jobs_of_a_cluster_one_fails(cluster: Slurm, tmp_path: Path):
    folder = tmp_path / "sweep"
    variables = environment(tmp_path / "home") | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    variables["PATH"] += ":/usr/sbin"
    command = [sys.executable, "-m", "moedist", "train", "-m", "hydra/launcher=slurm", f"run.dir={folder}", *TINY]
    command += ["hydra.launcher.options={gpus-per-node: 0, cpus-per-task: 2, time: 0:20:00}", "launch.nnodes=1"]
    command += ["train.steps=8", "train.eval_every=4", "train.optimizer.experts_lr=1e-3,1e20"]
    ended = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert ended.returncode == 5, ended.stdout + ended.stderr
    completed, failed = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert (completed["state"], failed["state"]) == ("COMPLETED", "FAILED"), ended.stdout
    assert completed["values"] is not None and "nan" in failed["message"]
    assert "SLURM job" in completed["place"] and (folder / "000.out").is_file()
    assert cluster.ask("squeue", "--noheader") == "", "a job was left behind"
