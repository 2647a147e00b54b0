"""The real command with DeepSpeed as its engine: preempted, resumed, gone on by the other engine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from moedist.train.checkpoint.manifest import folder_name, verify
from tests.end_to_end.runs import Command, of_no_clock, processes_of, train
from tests.rows import read_rows

pytestmark = pytest.mark.slow

COMMON = ("log/sink=[console,jsonl,gate]", "train.steps=24", "train.global_batch_tokens=64")
DEEPSPEED = (*COMMON, "engine=deepspeed", "engine.zero_stage=2")
STEPS = 24


def ended(command: Command) -> tuple[int, str, str]:
    """And what DeepSpeed says is in the ranks' logs alone."""
    exit_code, out, err = command.wait()
    assert "[INFO]" not in out + err and "[WARNING]" not in out + err and "Traceback" not in out + err, out + err
    return exit_code, out, err


def test_preempted_and_resumed_it_gives_the_same_bits(tmp_path: Path):
    whole = train(tmp_path / "whole", *DEEPSPEED)
    command = train(tmp_path / "run", *DEEPSPEED, gate=10)
    command.reached()
    command.process.send_signal(signal.SIGTERM)
    command.told("SIGTERM")
    command.open_gate()
    exit_code, out, err = ended(command)
    assert exit_code == 75, err
    assert "ZeRO 2" in out
    status = json.loads((command.folder / "status.json").read_text())
    assert (status["reason"], status["exit_code"]) == ("preempted", 75)
    assert verify(Path(status["last_good_checkpoint"])).step == status["step"] < STEPS
    exit_code, out, err = ended(train(command.folder, *DEEPSPEED, "run.resume=auto"))
    assert exit_code == 0, err
    exit_code, _, err = ended(whole)
    assert exit_code == 0, err
    assert of_no_clock(read_rows(command.folder)) == of_no_clock(read_rows(whole.folder))
    settings = json.loads((command.folder / "deepspeed.json").read_text())
    assert settings["zero_optimization"]["stage"] == 2 and settings["gradient_clipping"] == 0.5
    assert processes_of(tmp_path) == []

    native = train(
        command.folder, *COMMON, "train.steps=26", "launch.nproc=1", "mesh.ep=1", "engine=native", "run.resume=auto"
    )
    exit_code, _, err = native.wait()
    assert exit_code == 0, err
    assert "engine.kind: 'deepspeed' -> 'native'" in err
    assert verify(command.folder / "checkpoints" / folder_name(26)).step == 26
