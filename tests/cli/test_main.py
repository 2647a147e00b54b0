from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from moedist.cli.main import main, parse
from moedist.config import to_mapping
from moedist.launch.compose import compose
from moedist.train.status import Status

Output = pytest.CaptureFixture[str]
QUICK = ["data=synthetic", "data.num_tokens=50000", "mesh.device=cpu"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What would have been started; no rank is."""
    calls: list[dict] = []

    def run_ranks(ranks, launch, run_dir, target, *, lock=None, terminal=None) -> Status:
        calls.append({"ranks": ranks, "run_dir": run_dir, "target": target, "lock": lock, "terminal": terminal})
        return Status("nonfinite", 5, "A NaN.", rank=1, last_good_checkpoint="step_7", what_to_do="Lower the rate.")

    monkeypatch.setattr("moedist.launch.start.run_ranks", run_ranks)
    return calls


@pytest.mark.parametrize("argv", [[], ["train"], ["eval"], ["tokenize"], ["doctor"], ["doctor", "parity"]])
def test_help_has_examples(argv: list[str], capsys: Output):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said and f"moedist {argv[0] if argv else 'train'} " in said


def test_help_is_instant_because_it_imports_nothing_heavy():
    code = (
        "import sys; from moedist.cli.main import build_parser; build_parser(); "
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'pydantic', 'wandb', 'rich', 'yaml'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_overrides_and_flags_may_be_mixed():
    args = parse(["train", "a=1", "--json", "~b.c", "--dry-run", "+d=2"])
    assert args.overrides == ["a=1", "~b.c", "+d=2"] and args.json and args.dry_run
    args = parse(["train", "--moe.capacity.factor=1.0", "--moe/router=topk", "--json"])
    assert args.overrides == ["moe.capacity.factor=1.0", "moe/router=topk"] and args.json


def test_unknown_flags_are_refused(capsys: Output):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--dryrun"])
    assert caught.value.code == 2
    assert "--dryrun" in capsys.readouterr().err


def test_cfg_job_prints_every_key(capsys: Output):
    assert main(["train", "--cfg", "job", "experiment=null", "seed=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 3 and printed["train"]["optimizer"]["kind"] == "adamw"
    assert set(printed) == set(compose(["experiment=null"]).mapping)


def test_errors_go_to_people_and_to_scripts(capsys: Output):
    assert main(["train", "--json", "mesh.epp=2", "moe.router.topk=1"]) == 2
    said = capsys.readouterr()
    assert said.err.count("moedist train: ") == 2 and "Did you mean mesh.ep?" in said.err
    told = json.loads(said.out)
    assert told["exit_code"] == 2
    assert [error["key"] for error in told["errors"]] == ["mesh.epp", "moe.router.topk"]
    assert set(told["errors"][0]) == {"key", "value", "problem", "remedy"}


def test_several_values_need_a_sweep(capsys: Output):
    assert main(["train", "seed=1,2"]) == 2
    assert "add -m for a sweep with a run for each" in capsys.readouterr().err


def test_dry_run_makes_nothing(tmp_path: Path, started: list, capsys: Output):
    folder = tmp_path / "run"
    argv = ["train", "--dry-run", "--json", *QUICK, f"run.dir={folder}", "mesh.ep=4"]
    argv += ["train.global_batch_tokens=16384", "train.micro_batch=8", "train.sequence_length=256"]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["folder"], plan["ranks"], plan["ep"], plan["edp"], plan["accumulation"]) == (str(folder), 4, 4, 1, 2)
    assert plan["tokens_step"] == 16384
    assert [rank["rank"] for rank in plan["built"]["ranks"]] == [0, 3]
    assert not folder.exists() and started == []


def test_the_command_as_outside_checks_write_it(tmp_path: Path, started: list, capsys: Output):
    argv = [
        "train",
        "experiment=tiny_cpu",
        f"run.dir={tmp_path}/r",
        "launch.nproc=4",
        "mesh.ep=2",
        "train.steps=20",
        "seed=1",
    ]
    assert main(argv) == 5
    (call,) = started
    assert call["ranks"].world_size == 4 and call["run_dir"] == tmp_path / "r"
    assert call["target"] == ["moedist.train", str(tmp_path / "r" / "config.yaml")]
    written = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (written["seed"], written["train"]["steps"]) == (1, 20)
    assert to_mapping(compose(argv[1:]).config) == written
    said = capsys.readouterr().err
    for words in ("ended with nonfinite: A NaN.", "rank_1.log", "last good checkpoint: step_7", "Lower the rate."):
        assert words in said
    assert main(argv) == 2
    assert "holds a run already" in capsys.readouterr().err and len(started) == 1


def test_json_keeps_standard_output_for_scripts(tmp_path: Path, started: list, capsys: Output):
    assert main(["train", "--json", *QUICK, f"run.dir={tmp_path}/r"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert (told["reason"], told["exit_code"], told["run_dir"]) == ("nonfinite", 5, f"{tmp_path}/r")
    assert started[0]["terminal"] is sys.stderr


@pytest.mark.slow
def test_1024_ranks_are_planned_on_one_machine(started: list, capsys: Output):
    command = ["train", "--dry-run", "launch.nnodes=128", "launch.nproc=8", "mesh.ep=64"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "moe.num_experts = 8 cannot be cut into 64 equal parts" in said
    assert "Set mesh.ep to one of [1, 2, 4, 8], or moe.num_experts to a multiple of 64." in said
    assert main([*command, "experiment=olmoe_1b_7b", "train.micro_batch=1"]) == 0
    said = capsys.readouterr().out
    for words in (
        "data         not ready on this machine: data.files = [] names no files.",
        "rank 0\n  dp        0-1023 (1024)\n  ep        0-63 (64)\n  ep_across 0, 8, ..., 56 (8)\n",
        "  ep_inside 0-7 (8)\n  edp       0, 64, ..., 960 (16)\n",
        "  experts   63 of layers 0-15\n  memory    8.604 GiB: weights 2.151 GiB, gradients 2.151 GiB, optimizer",
        "rank 64\n  dp        0-1023 (1024)\n  ep        64-127 (64)\n",
        "check        all 6,919,161,856 parameters are there, each exactly once",
        "not counted  activations,",
    ):
        assert words in said
    assert (
        main([*command, "experiment=olmoe_1b_7b", "train.micro_batch=1", "mesh.fsdp=1024", "engine.offload=true"]) == 0
    )
    cut = capsys.readouterr().out
    assert (
        "memory    0.101 GiB on the host: weights 0.025 GiB" in cut
        and "fsdp      0-1023 (1024)\n  replicate 63 (1)\n" in cut
    )
    assert re.search(r"experts\.down +16 +\[64, 1024, 2048\] +1024 +1 +\[1, 64, 2048\]\n", cut)
    assert re.search(r"experts\.down +16 +\[64, 1024, 2048\] +64 +16 +\[1, 1024, 2048\]\n", said)
    assert started == []


def test_engines_that_need_their_ranks_are_not_planned(capsys: Output):
    pytest.importorskip("deepspeed")
    assert main(["train", "--dry-run", *QUICK, "engine=deepspeed"]) == 2
    assert "cannot be built without its ranks. Plan with engine=native" in capsys.readouterr().err


def test_what_several_nodes_need(tmp_path: Path, started: list, capsys: Output):
    assert main(["train", *QUICK, "launch.nnodes=2"]) == 2
    assert "launch.rendezvous = None says no meeting point for 2 nodes" in capsys.readouterr().err
    nodes = [*QUICK, "launch.nnodes=2", "launch.rendezvous=node:29400"]
    assert main(["train", *nodes]) == 2
    assert "run.dir = None names no folder that several nodes share" in capsys.readouterr().err
    assert main(["train", *nodes, f"run.dir={tmp_path}/r"]) == 5
    assert started[0]["target"] == ["moedist.train", *nodes, f"run.dir={tmp_path}/r"]
    assert not (tmp_path / "r" / "config.yaml").exists(), "rank 0 makes the folder"


def test_a_warning_is_one_sentence(started: list, tmp_path: Path, capsys: Output):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["train", "--dry-run", *QUICK, "moe.capacity.factor=0.5"])
    said = capsys.readouterr().err
    assert "moedist: warning: " in said and ".py:" not in said
