"""Sweeps as users run them: Hydra's multirun, torchrun, ranks."""

from __future__ import annotations

import json
import os
import signal
import statistics
from pathlib import Path

import pytest

from tests.end_to_end.runs import TINY, Command, of_no_clock, processes_of, start
from tests.rows import read_rows

pytestmark = pytest.mark.slow

SHORT = ("train.steps=8", "train.eval_every=4", "train.checkpoint_every=4")


def sweep(
    folder: Path, *overrides: str, gate: int | None = None, before: tuple[Path, ...] = (), resume: str = "never"
) -> Command:
    """``moedist train -m`` of the tiny run in ``folder``."""
    where = (f"run.dir={folder}", f"run.resume={resume}")
    return start(folder, "train", "-m", *TINY, *where, *overrides, gate=gate, before=before)


def jobs_of(folder: Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["jobs"]


def one_of(command: Command, job: str) -> Command:
    """A job of a sweep, to wait for and to open the gate of."""
    return Command(command.process, command.folder / job)


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in entries if b"=" in entry)


def test_one_of_two_jobs_fails_and_its_ranks_start_apart(tmp_path: Path):
    """2 jobs x 2 ranks; rank 1 comes 1.5 s late, where one run once made two folders and lost its rendezvous."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(1.5)\n")
    command = sweep(tmp_path / "sweep", *SHORT, "train.optimizer.experts_lr=1e20,1e-3", before=(late,))
    exit_code, out, err = command.wait(400)
    assert exit_code == 5, err
    failed, completed = jobs_of(command.folder)
    assert (failed["state"], failed["exit_code"]) == ("FAILED", 5) and "nan" in failed["message"]
    assert Path(failed["log"]).is_file() and Path(failed["log"]).parent == command.folder / "000" / "logs"
    assert f"000: FAILED with exit code 5: {failed['message']}" in out and failed["log"] in out
    assert (completed["state"], completed["exit_code"], completed["place"]) == ("COMPLETED", 0, failed["place"])
    assert completed["values"] == [read_rows(command.folder / "001")[-1]["eval/loss"]]
    folders = {entry.name for entry in command.folder.iterdir() if entry.is_dir()}
    assert folders == {"000", "001"}, "a rank made a folder of its own"
    assert processes_of(command.folder) == []


def test_packed_jobs_share_nothing_and_go_on_after_ctrl_c(tmp_path: Path):
    several = ("seed=1,2", "hydra.launcher.ranks_per_job=2")
    if len(os.sched_getaffinity(0)) < 4:
        pytest.skip("two jobs of two ranks side by side need four cores")
    command = sweep(tmp_path / "sweep", *several, gate=10)
    jobs = [one_of(command, name) for name in ("000", "001")]
    for job in jobs:
        job.reached()
    ranks = [[job.pid_of(rank) for rank in range(2)] for job in jobs]
    cores = [set.union(*(os.sched_getaffinity(pid) for pid in pids)) for pids in ranks]
    assert len(cores[0]) == len(cores[1]) >= 2 and not cores[0] & cores[1], "they share cores"
    seen = [environment_of(pids[0]) for pids in ranks]
    for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        assert seen[0][name] != seen[1][name], f"they share {name}"

    command.process.send_signal(signal.SIGINT)
    for job in jobs:
        job.told("SIGTERM")
        job.open_gate()
    exit_code, out, err = command.wait()
    assert exit_code == 75, err
    assert "Go on with run.resume=auto" in out
    assert [job["state"] for job in jobs_of(command.folder)] == ["STOPPED", "STOPPED"]
    assert processes_of(command.folder) == [], "orphans"

    again = sweep(command.folder, *several, resume="auto")
    exit_code, out, err = again.wait()
    assert exit_code == 0, err
    whole = sweep(tmp_path / "whole", *several)
    assert whole.wait()[0] == 0
    for name in ("000", "001"):
        rows = [of_no_clock(read_rows(folder / name)) for folder in (command.folder, tmp_path / "whole")]
        assert rows[0] == rows[1], "a job that went on differs from one that never stopped"
    before = [(command.folder / name / "status.json").stat().st_mtime_ns for name in ("000", "001")]
    third = sweep(command.folder, "seed=1,2,3", "hydra.launcher.ranks_per_job=2", resume="auto")
    exit_code, out, err = third.wait()
    assert exit_code == 0 and out.count("not run again") == 2, err
    assert before == [(command.folder / name / "status.json").stat().st_mtime_ns for name in ("000", "001")]
    assert [job["state"] for job in jobs_of(command.folder)] == ["COMPLETED"] * 3


def test_a_killed_sweep_leaves_no_orphan(tmp_path: Path):
    command = sweep(tmp_path / "sweep", "seed=1,2", gate=10)
    job = one_of(command, "000")
    job.reached()
    pids = [job.pid_of(rank) for rank in range(2)]
    command.process.kill()
    command.process.wait()
    job.open_gate()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        signal.sigtimedwait([], 0.1)
    again = sweep(command.folder, "seed=1,2", resume="auto")
    exit_code, _, err = again.wait()
    assert exit_code == 0, err
    assert [job["state"] for job in jobs_of(command.folder)] == ["COMPLETED", "COMPLETED"]


def test_optuna_prunes_and_goes_on_from_its_storage(tmp_path: Path):
    """Six trials over one rank each: two that learn, then four at a rate at which nothing is learnt. Each waits after
    its first evaluation, the hopeless ones until they have been told to stop."""
    pytest.importorskip("optuna")
    study = (
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=random",
        "hydra.sweeper.sampler.seed=2",
        f"hydra.sweeper.storage='sqlite:///{tmp_path}/study.db'",
        "hydra.sweeper.study_name=tiny",
        "hydra.sweeper.n_jobs=1",
        "hydra.launcher.ranks_per_job=1",
        "hydra.launcher.prune_after_jobs=2",
        "mesh.ep=1",
        "train.checkpoint_every=null",
        "train.eval_every=25",
        "train.steps=50",
    )
    rates = "train.optimizer.experts_lr=choice(1e-2,1e-9)"
    space = (rates, "train.optimizer.other_lr=${train.optimizer.experts_lr}", "moe.capacity.factor=interval(1.0,2.0)")
    command = sweep(tmp_path / "sweep", *study, "hydra.sweeper.n_trials=6", *space, gate=26)
    for number in range(6):
        job = one_of(command, f"{number:03d}")
        job.reached()
        if number >= 2:
            job.told("SIGTERM")
        job.open_gate()
    exit_code, out, err = command.wait(600)
    assert exit_code == 0, err
    jobs = jobs_of(command.folder)
    assert [job["state"] for job in jobs] == ["COMPLETED"] * 2 + ["PRUNED"] * 4
    median = statistics.median(job["by_step"]["25"] for job in jobs[:2])
    for job in jobs[2:]:
        assert "train.optimizer.experts_lr=1e-09" in job["overrides"]
        assert list(job["by_step"]) == ["25"] and job["by_step"]["25"] > median, "pruned without a cause, or too late"
        assert f"Hopeless at step 25: {job['values'][0]:.5g}, and the median is {median:.5g}." == job["message"]
        assert json.loads((command.folder / job["run_dir"] / "status.json").read_text())["reason"] == "preempted"

    more = ("hydra.sweeper.n_trials=1", "hydra.sweeper.sampler.seed=3")  # the first seed would ask for the first trials
    again = sweep(command.folder, *study, *more, *space, resume="auto")
    exit_code, out, err = again.wait(300)
    assert exit_code == 0, err
    import optuna

    trials = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert len(trials) == 7 and len(jobs_of(command.folder)) == 7
    values = [job["values"][0] for job in jobs_of(command.folder)]
    assert [trial.value for trial in trials] == pytest.approx(values)


def test_optuna_with_two_objectives(tmp_path: Path):
    pytest.importorskip("optuna")
    command = sweep(
        tmp_path / "sweep",
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=nsgaii",
        "hydra.sweeper.sampler.seed=1",
        "hydra.sweeper.direction=[minimize,minimize]",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "hydra.launcher.ranks_per_job=2",
        "hydra.launcher.objective=[eval/loss,{moe/max_vio: 1, moe/drop_rate: 0.5}]",
        "moe.capacity.factor=interval(0.5,2.0)",
        *SHORT,
    )
    exit_code, _, err = command.wait(400)
    assert exit_code == 0, err
    for job in jobs_of(command.folder):
        last = read_rows(command.folder / job["run_dir"])[-1]
        assert job["values"] == pytest.approx([last["eval/loss"], last["moe/max_vio"] + 0.5 * last["moe/drop_rate"]])
    assert "solutions" in (command.folder / "optimization_results.yaml").read_text()
