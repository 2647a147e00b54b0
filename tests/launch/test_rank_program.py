"""Raw ``torchrun -m moedist.train key=value``: real torchrun, a stub for the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moedist.launch.compose import compose
from moedist.launch.folder import claim_folder
from moedist.launch.saved import read_mapping
from moedist.train import __main__ as program

ROOT = Path(__file__).parents[2]
SMALL = ["data=synthetic", "data.num_tokens=50000", "mesh.device=cpu"]


def torchrun(folder: Path, skew_s: float, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.launch.rank_program", str(skew_s), *SMALL, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, Path]]]:
    """Exit code, output and working folder of each job; they run at once, because each takes seconds to start."""
    wanted = {"skewed": (2.0, ["mesh.ep=2", "seed=9"]), "refused": (0.0, ["mesh.ep=3", "train.global_batch_tokens=7"])}
    started = {}
    for name, (skew_s, overrides) in wanted.items():
        folder = tmp_path_factory.mktemp(name)
        started[name] = (torchrun(folder, skew_s, *overrides), folder)
    yield {name: (*_end(process), folder) for name, (process, folder) in started.items()}


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=400)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.pitfall("35")
def test_two_ranks_with_two_seconds_of_skew_make_one_folder(jobs: dict[str, tuple[int, str, Path]]):
    exit_code, said, folder = jobs["skewed"]
    assert exit_code == 0, said
    (run_dir,) = (folder / "runs").iterdir()
    given = [json.loads((run_dir / f"given_{rank}.json").read_text()) for rank in range(2)]
    assert given[0]["config"] == given[1]["config"] == read_mapping(run_dir / "config.yaml")
    assert (given[0]["config"]["seed"], given[0]["ep"]) == (9, 2)
    assert {one["run_dir"] for one in given} == {str(run_dir)}
    assert [one["terminal"] for one in given] == [True, False]
    for rank in range(2):
        assert "said by a rank" in (run_dir / "logs" / f"rank_{rank}.log").read_text()
    assert "said by a rank" not in said


@pytest.mark.slow
def test_a_configuration_that_cannot_work_ends_all_ranks_with_one_message(jobs: dict[str, tuple[int, str, Path]]):
    exit_code, said, folder = jobs["refused"]
    assert exit_code == 1  # torchrun's own, always
    assert said.count("mesh.ep = 3 does not divide the 2 ranks launched") == 1
    assert said.count("train.global_batch_tokens = 7 is no multiple") == 1
    assert "exitcode  : 2" in said and "moedist/train/__main__.py" not in said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_multirun_is_refused_with_the_command_to_use(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flag: str, rank: int
):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("moedist.launch.process.die_with_parent", lambda: None)
    assert program.main([flag, "seed=1"]) == 2
    said = capfd.readouterr().err
    assert said.count("moedist train -m seed=1") == (rank == 0)


def test_without_torchrun_it_is_the_train_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert program.main(["mesh.epp=1"]) == 2
    assert "moedist train: mesh.epp = 1 is not a known key. Did you mean mesh.ep?" in capfd.readouterr().err


def test_ranks_that_were_started_again_take_their_folder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the configuration of the first start: a branch off another run that has saved nothing yet begins there."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = [*SMALL, "experiment=null", f"run.dir={tmp_path / 'run'}"]
    first = compose(words)
    claim_folder(first.config.run, first.mapping).release()
    assert "holds a run already" in program._decide(words, 2)["said"]
    decision = program._decide(words, 2, again=True)
    assert decision["mapping"] == read_mapping(tmp_path / "run" / "config.yaml") == first.mapping
    assert decision["mapping"]["run"]["resume"] == "never" and not list((tmp_path / "run").glob("config_*"))


def test_ranks_with_other_arguments_are_named(tmp_path: Path):
    decision = program._decide(SMALL, 4, strangers=[2, 3])
    assert decision["exit_code"] == 2
    assert "ranks = [2, 3] were given other arguments than rank 0" in decision["said"]
