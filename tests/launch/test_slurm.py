"""launch/slurm.sbatch on a SLURM cluster of this machine: started, signalled, requeued, resumed."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import TINY, of_no_clock, train
from tests.launch.namespaces import ROOT, environment
from tests.launch.slurm import Slurm, slurm, why_not
from tests.rows import read_rows

pytestmark = pytest.mark.slow
LIMIT_S = 420.0
RANKS = ("launch.nproc=1", "mesh.ep=2", "log/sink=[console,jsonl,gate]")
OPTIONS = ("--gpus-per-node=0", "--cpus-per-task=2", "--time=0:20:00")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        with slurm(Path(folder)) as made:
            yield made


def submit(cluster: Slurm, base: Path, *words: str, options: tuple[str, ...] = (), gate: int | None = None) -> str:
    variables = environment(base / "home") | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    variables["PATH"] += ":/usr/sbin"
    if gate is not None:
        variables["OUTSIDE_GATE"] = str(gate)
    command = ["sbatch", "--parsable", *OPTIONS, f"--output={base}/job.out", *options]
    command += [str(ROOT / "launch" / "slurm.sbatch"), *words]
    said = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout.strip().partition(";")[0]


def wait_for(condition: Callable[[], object], said: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, said.read_text(errors="replace") if said.exists() else "no output"
        time.sleep(0.1)


def has_ended(cluster: Slurm, job: str) -> bool:
    return cluster.field(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def test_a_job_is_signalled_requeued_and_resumed(cluster: Slurm, tmp_path: Path):
    """The signal that --signal=B:USR1 sends before the time limit, by hand; then SLURM alone brings the job back."""
    folder, said = tmp_path / "run", tmp_path / "job.out"
    words = (f"run.dir={folder}", *TINY, *RANKS)
    job = submit(cluster, tmp_path, *words, gate=10)
    wait_for(lambda: (folder / "gate_reached").exists() or has_ended(cluster, job), said)
    assert cluster.field(job, "Restarts") == "0" and cluster.field(job, "NumNodes") == "2"
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    (log,) = (folder / "logs").glob("launcher_*.log")  # the two nodes share a host name
    wait_for(lambda: log.read_text().count("SIGTERM") >= 2, said)
    (folder / "gate_open").touch()
    wait_for(lambda: cluster.field(job, "Restarts") == "1" or has_ended(cluster, job), said)
    wait_for(lambda: has_ended(cluster, job), said)
    text = said.read_text()
    assert cluster.field(job, "JobState") == "COMPLETED" and cluster.field(job, "ExitCode") == "0:0", text
    assert "stopped and saved; requeued" in text and "start 2, 2 nodes" in text
    assert json.loads((folder / "status.json").read_text())["reason"] == "done"
    steps = [row["train/step"] for row in read_rows(folder)]
    assert max(steps) == 40 and "resume " in text, "the second start went on from the first one's checkpoint"
    whole = train(tmp_path / "whole", "launch.nproc=2", "mesh.ep=2", "log/sink=[jsonl]")
    assert whole.wait()[0] == 0
    assert of_no_clock(read_rows(folder)) == of_no_clock(read_rows(whole.folder))


def test_a_configuration_that_cannot_be_ends_the_job_with_its_code(cluster: Slurm, tmp_path: Path):
    said = tmp_path / "job.out"
    job = submit(cluster, tmp_path, f"run.dir={tmp_path / 'run'}", *TINY, "mesh.epp=3")
    wait_for(lambda: has_ended(cluster, job), said)
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0", said.read_text()
    assert "mesh.epp" in said.read_text()
    job = submit(cluster, tmp_path, *TINY)
    wait_for(lambda: has_ended(cluster, job), said)
    assert cluster.field(job, "ExitCode") == "2:0" and "Set run.dir" in said.read_text()
