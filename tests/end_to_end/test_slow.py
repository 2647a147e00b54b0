"""Faults that take real time, and the quick start's promise; minutes in all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moedist.data.python_stdlib import PythonStdlibConfig
from moedist.data.yardstick import bigram_cross_entropy
from moedist.train.checkpoint.manifest import folder_name, verify
from tests.end_to_end.runs import Command, of_no_clock, processes_of, start, train
from tests.rows import read_rows

pytestmark = pytest.mark.slow


def status_of(command: Command) -> dict:
    return json.loads((command.folder / "status.json").read_text())


def test_a_rank_that_stops_is_named_and_the_others_leave(tmp_path: Path):
    """SIGSTOP: the others' collectives give up after mesh.timeout_s, and the launcher kills the stopped one."""
    timeout_s = 8
    command = train(tmp_path / "run", f"mesh.timeout_s={timeout_s}", "mesh.save_timeout_s=20", gate=10)
    command.reached()
    stopped = command.pid_of(1)
    os.kill(stopped, signal.SIGSTOP)
    command.open_gate()
    began = time.monotonic()
    exit_code, _, err = command.wait()
    assert exit_code == 5, err
    # The time-out, one more for a second collective, torchrun's 30 s of patience with a stopped process, and slack.
    assert time.monotonic() - began < 2 * timeout_s + 30 + 25
    status = status_of(command)
    assert (status["reason"], status["exit_code"]) == ("peer_lost", 5)
    assert "rank 1" in status["message"].lower() and f"process {stopped}" in status["message"]
    assert status["last_good_checkpoint"].endswith(folder_name(6))
    assert processes_of(command.folder) == []


def test_a_recorded_run_is_replayed_at_other_layouts(tmp_path: Path):
    """The real commands: two ranks at EP=2 record, four at EP=1 and one replay; counts and losses are the run's."""
    short = ("train.steps=4", "train.log_every=1", "train.eval_every=null", "train.checkpoint_every=null")
    batch = ("train.global_batch_tokens=128", "moe.router.noise_std=0.3")
    recorded = train(tmp_path / "recorded", *short, *batch, "log.trace.every=1")
    assert recorded.wait()[0] == 0
    assert len(list((tmp_path / "recorded" / "traces").glob("step_*/rank_*_of_00002.npz"))) == 8
    replay = ("moe/router=replay", f"moe.router.trace={tmp_path / 'recorded'}")
    for ranks, ep in ((4, 1), (1, 1)):
        layout = (f"launch.nproc={ranks}", f"mesh.ep={ep}")
        command = train(tmp_path / f"ranks_{ranks}", *short, *replay, *batch, *layout)
        exit_code, out, err = command.wait()
        assert exit_code == 0, err
        assert "forced replay routing: the numbers of this run are not a trained model's" in out
        for got, expected in zip(read_rows(command.folder), read_rows(recorded.folder), strict=True):
            assert got["moe/routing"] == "forced replay"
            assert got["moe/layer_01/load"] == expected["moe/layer_01/load"]
            assert got["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4)
    other = train(tmp_path / "other", *short, *replay, *batch, "moe.num_experts=4")
    exit_code, _, err = other.wait()
    assert exit_code == 2 and "moe.router.trace" in err and not other.folder.exists()


def test_ctrl_c_saves_and_ends_all_within_ten_seconds(tmp_path: Path):
    """On a machine that does nothing else; what it saves is held in test_runs."""
    command = train(tmp_path / "run", gate=4)
    command.reached()
    command.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    command.told("SIGTERM")
    command.open_gate()
    exit_code, _, err = command.wait()
    assert exit_code == 75, err
    assert time.monotonic() - began < 10
    assert processes_of(command.folder) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte: room for a folder, its logs and a checkpoint, and for no second one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(small_disk: Path, tmp_path: Path):
    folder = small_disk / "run"
    command = train(folder, "log/sink=[console,jsonl,gate]", "checkpoint.keep=null", gate=10)
    command.reached()
    fill(small_disk)
    command.open_gate()
    exit_code, _, err = command.wait()
    assert exit_code == 4, err
    good = folder / "checkpoints" / folder_name(6)
    assert verify(good).step == 6
    assert str(good) in err and "room" in err
    (small_disk / "filler").unlink()
    whole = train(tmp_path / "whole", "log/sink=[jsonl]")
    assert whole.wait()[0] == 0
    moved = tmp_path / "moved"
    shutil.move(folder, moved)  # to a disk with room
    again = train(moved, "log/sink=[jsonl]", "run.resume=auto")
    assert again.wait()[0] == 0
    last = max(of_no_clock(read_rows(moved)))
    assert of_no_clock(read_rows(moved))[last] == of_no_clock(read_rows(whole.folder))[last]


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return


def test_a_group_of_ranks_is_started_again(tmp_path: Path):
    """launch.max_restarts=1: a kill costs steps since the last checkpoint, nothing else."""
    whole = train(tmp_path / "whole", "log/sink=[jsonl]")
    command = train(tmp_path / "run", "log/sink=[jsonl,gate]", "launch.max_restarts=1", gate=10)
    command.reached()
    os.kill(command.pid_of(1), signal.SIGKILL)
    command.open_gate()
    assert whole.wait()[0] == 0
    exit_code, _, err = command.wait()
    assert exit_code == 0, err
    assert of_no_clock(read_rows(command.folder)) == of_no_clock(read_rows(whole.folder))
    assert status_of(command)["reason"] == "done"


def test_the_quick_start_learns(tmp_path: Path):
    """The recipe that launch/quickstart.sh runs ends at least 0.3 nats per byte below a smoothed byte-bigram model."""
    command = start(tmp_path / "run", "train", "experiment=tiny_cpu", f"run.dir={tmp_path / 'run'}")
    exit_code, out, err = command.wait(limit_s=1800)
    assert exit_code == 0, err
    yardstick = bigram_cross_entropy(PythonStdlibConfig().open())
    assert f"{yardstick:.4f} nats per byte" in out
    losses = [row["eval/loss"] for row in read_rows(command.folder) if "eval/loss" in row]
    assert losses[-1] <= yardstick - 0.3
