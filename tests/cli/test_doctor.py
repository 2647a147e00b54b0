from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moedist.cli.main import main
from moedist.doctor.finding import Finding, ok, problem, warning
from moedist.launch.compose import compose
from moedist.launch.rank_check import RankCheck
from moedist.train.status import Status

ROOT = Path(__file__).parents[2]
QUICK = ["data=synthetic", "data.num_tokens=50000", "mesh.device=cpu"]
Output = pytest.CaptureFixture[str]


def result(good: bool) -> dict[str, Any]:
    sizes = {"layout": "2 pieces x 2 copies", "largest": 1.0, "difference": 0.0 if good else 0.5, "limit": 1e-12}
    names = ["moe.router.weight", *(f"blocks.{index}.weight" for index in range(8))]
    return {
        "good": good,
        "precision": "fp64",
        "tolerance": 1e-12,
        "numbers": {"loss": {"ranks": 1.5, "one_device": 1.5, "good": True}},
        "pairs": {"asked": 64, "kept": 60, "good": True},
        "parameters": [{"name": name, **sizes, "good": good or index > 0} for index, name in enumerate(names)],
        "last_wrong": None if good else names[0],
        "data": "synthetic",
        "seconds": 1.0,
    }


@pytest.fixture
def outcome() -> list[str]:
    """Holds something where ranks shall differ from one device."""
    return []


@pytest.fixture
def started(outcome: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been started; the ranks' results are those set here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    calls: list[dict[str, Any]] = []

    def run_ranks(ranks, launch, run_dir, target, *, lock=None, terminal=None) -> Status:
        written = yaml.safe_load((run_dir / "config.yaml").read_text())
        calls.append({"ranks": ranks, "run_dir": run_dir, "target": target, "config": written})
        (run_dir / "parity.json").write_text(json.dumps(result(good=not outcome)))
        return Status("done", 0, "Compared.")

    monkeypatch.setattr("moedist.launch.parity.run_ranks", run_ranks)
    return calls


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Finding]]:
    """What this machine and its ranks would be found to be; nothing is looked at or started."""
    found = {"machine": [ok("disk", "much room")], "ranks": [ok("barrier", "1 ms")]}
    monkeypatch.setattr("moedist.launch.examine.examine", lambda config, ranks: found["machine"])

    def check_ranks(ranks, launch, mesh):
        assert ranks.nproc == 3
        if not found["ranks"]:
            return RankCheck([problem("ranks", "rank 1 did not come", "See why.")], exit_code=5)
        return RankCheck(found["ranks"], {"hosts": ["n0"]})

    monkeypatch.setattr("moedist.launch.rank_check.check_ranks", check_ranks)
    return found


NPROC = ["--nproc", "3", "mesh.ep=1"]


def test_the_machine_and_its_ranks(environment: dict, capsys: Output):
    assert main(["doctor", *NPROC]) == 0
    said = capsys.readouterr().out
    assert said == (
        "ok       disk                much room\nok       barrier             1 ms\n\nproblem 0, warning 0, ok 2\n"
    )
    assert main(["doctor", "ranks", *NPROC]) == 0 and "disk" not in capsys.readouterr().out
    assert main(["doctor", "machine", *NPROC]) == 0 and "barrier" not in capsys.readouterr().out


def test_exit_codes_of_an_environment(environment: dict, capsys: Output):
    environment["machine"] = [warning("disk", "little room", "Make room.")]
    assert main(["doctor", *NPROC]) == 0
    assert "\nwarning  disk                little room\n   " in "\n" + capsys.readouterr().out
    environment["machine"] = [problem("disk", "no room", "Make room.")]
    assert main(["doctor", "machine", "--json", *NPROC]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 4 and told["measured"] is None
    assert told["findings"] == [{"check": "disk", "level": "problem", "text": "no room", "remedy": "Make room."}]
    environment["machine"] = [ok("disk", "much room")]
    environment["ranks"] = [problem("all-reduce", "wrong values arrived at rank 1 (n0)", "Take it out.")]
    assert main(["doctor", *NPROC]) == 4
    environment["ranks"] = []
    assert main(["doctor", *NPROC]) == 5
    assert main(["doctor", "launch.nnodes=2", *NPROC]) == 2
    assert "says no meeting point for 2 nodes" in capsys.readouterr().err


def test_a_real_machine_is_examined(tmp_path: Path, capsys: Output):
    assert main(["doctor", "machine", "--json", f"run.dir={tmp_path}/run", "log/sink=[console]", *QUICK]) == 0
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["disk"]["text"].startswith(f"{tmp_path}: ") and not list(tmp_path.iterdir())
    assert found["devices"]["text"].startswith("the CPU") and found["wandb"]["text"] == "not among log.sinks"


def test_what_is_equal(started: list, capsys: Output):
    assert main(["doctor", "parity", *QUICK, "moe.capacity.drop_policy=choice", "mesh.ep=2"]) == 0
    said = capsys.readouterr().out
    for words in ("model.layers.num_layers: 4 -> 2", "loss       1.500000, differs by 0.0e+00  equal", "60 kept"):
        assert words in said
    assert "equal: all 9 gradients, within 1e-12 x max|g| (fp64)" in said and said.count("pieces x") == 5
    (call,) = started
    assert call["target"] == ["moedist.train", str(call["run_dir"] / "config.yaml"), "--parity"]
    assert call["config"]["moe"]["capacity"]["drop_policy"] == "choice"
    assert not call["run_dir"].exists(), "nothing is left"


def test_what_is_not(started: list, outcome: list[str], capsys: Output):
    outcome.append("unequal")
    assert main(["doctor", "parity", *QUICK]) == 5
    said = capsys.readouterr().out
    assert "UNEQUAL: 1 of 9 gradients, beyond 1e-12 x max|g| (fp64)\nlook first at moe.router.weight: " in said
    assert main(["doctor", "parity", "--json", *QUICK]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"][0]["name"] == "moe.router.weight" and told["changes"] and not told["good"]


def test_ranks_that_fail(started: list, capsys: Output, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moedist.launch.parity.run_ranks", lambda *_, **__: Status("bug", 5, "A rank failed.", rank=1))
    assert main(["doctor", "parity", *QUICK]) == 5
    assert "moedist doctor: ended with bug: A rank failed." in capsys.readouterr().err


def test_a_runs_own_configuration(started: list, tmp_path: Path, capsys: Output):
    mapping = compose([*QUICK, "moe.router.top_k=3", f"run.dir={tmp_path}"]).mapping
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mapping))
    assert main(["doctor", "parity", str(tmp_path), "moe.capacity.factor=2.0"]) == 0
    (call,) = started
    assert call["config"]["moe"]["router"]["top_k"] == 3 and call["config"]["moe"]["capacity"]["factor"] == 2.0
    assert main(["doctor", "parity", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_what_cannot_run_is_refused(started: list, capsys: Output):
    assert main(["doctor", "parity", *QUICK, "mesh.ep=3"]) == 2
    assert "mesh.ep = 3 does not divide" in capsys.readouterr().err and started == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["experiment=olmoe_1b_7b"], 0, "equal: all"),
        (["mesh.ep=4", "mesh.fsdp=4", "train.activation_checkpointing=full", *QUICK], 0, "(fp64)"),
        (["mesh.ep=4", "engine=deepspeed", "engine.zero_stage=2", *QUICK], 0, "(fp32)"),
        (["plugins=[faulty]", "moe/dispatch=gateless", *QUICK], 5, ".router.weight"),
        (["plugins=[faulty]", "moe/experts=halved", *QUICK], 5, ".experts.down"),
    ],
)
def test_on_real_ranks(overrides: list[str], code: int, words: str):
    if "engine=deepspeed" in overrides:
        pytest.importorskip("deepspeed")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'doctor' / 'src'}"
    command = [sys.executable, "-m", "moedist", "doctor", "parity", *overrides]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stdout.splitlines()[-2], ended.stdout
