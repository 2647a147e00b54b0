"""The files of launch/ for schedulers, as far as they can be held without one: shape, keys, and what they run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moedist.cli.main import parse
from moedist.launch.compose import compose
from moedist.train.status import EXIT_CODES

LAUNCH = Path(__file__).parents[2] / "launch"

Shape = dict[str, Any]
"""Allowed keys, each with the shape of what is below it: a type, a Shape, a list of one shape, or None for anything."""

POD: Shape = {
    "terminationGracePeriodSeconds": int,
    "volumes": [
        {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str, "sizeLimit": str}}
    ],
    "containers": [{"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
}
TRAIN_JOB: Shape = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"generateName": str, "labels": None},
    "spec": {
        "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
        "trainer": {
            "image": str,
            "numNodes": int,
            "command": [str],
            "args": [str],
            "env": [
                {"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}
            ],
            "resourcesPerNode": {"requests": None, "limits": None},
        },
        "runtimePatches": [
            {
                "manager": str,
                "trainingRuntimeSpec": {
                    "template": {
                        "spec": {
                            "replicatedJobs": [
                                {
                                    "name": str,
                                    "template": {"spec": {"template": {"metadata": {"labels": None}, "spec": POD}}},
                                }
                            ]
                        }
                    }
                },
            }
        ],
    },
}
"""Of trainer.kubeflow.org/v1alpha1 as of Kubeflow Trainer 2.2, the part that is used here."""
SKY_TASK: Shape = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "accelerators": str,
        "cpus": str,
        "use_spot": bool,
        "disk_size": int,
        "network_tier": str,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
    },
    "file_mounts": None,
    "envs": None,
    "setup": str,
    "run": str,
}
"""Of SkyPilot's task specification, the part that is used here."""


def check_shape(value: Any, shape: Any, place: str) -> None:
    if shape is None:
        return
    if isinstance(shape, dict):
        assert isinstance(value, dict), place
        for key in value:
            assert key in shape, f"{place}.{key} is no such key"
            check_shape(value[key], shape[key], f"{place}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), place
        for index, each in enumerate(value):
            check_shape(each, shape[0], f"{place}[{index}]")
    else:
        assert type(value) is shape, f"{place} is {value!r}"


def run_script(script: str, words: list[str], variables: dict[str, str], folder: Path) -> list[str]:
    """What a script gives to `moedist`, which is replaced by a program that prints its arguments."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / "moedist"
    program.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    ended = subprocess.run(
        ["bash", "-c", script, *words], env=environment, cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def check_command(said: list[str], nnodes: int, rendezvous: str, holds: bool) -> None:
    """``said`` is a command of ours that names the cluster which the scheduler told of."""
    args = parse(said)
    assert args.command == "train"
    given = dict(text.split("=", 1) for text in args.overrides)
    assert (given["launch.nnodes"], given["launch.rendezvous"].strip("'")) == (str(nnodes), rendezvous)
    assert given["launch.holds_rendezvous"] == str(holds).lower()


def test_trainjob(tmp_path: Path):
    job, policy = yaml.safe_load_all((LAUNCH / "trainjob.yaml").read_text())
    check_shape(job, TRAIN_JOB, "trainjob")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = job["spec"]
    (patched,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = patched["template"]["spec"]["template"]["spec"]
    assert patched["name"] == pod["containers"][0]["name"] == "node", "of the runtime torch-distributed"
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    labels = patched["template"]["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    script, *words = spec["trainer"]["args"]
    assert spec["trainer"]["command"] == ["bash", "-c"]
    told = {"PET_NNODES": "2", "PET_MASTER_ADDR": "job-node-0-0.job"}
    for rank in (0, 1):
        said = run_script(script, words, {**told, "PET_NODE_RANK": str(rank)}, tmp_path)
        check_command(said, 2, "job-node-0-0.job:29400", rank == 0)
    grace = compose([text for text in said[1:] if text.startswith("launch.")]).config.launch.stop_after_s
    assert pod["terminationGracePeriodSeconds"] > grace
    environment = {"PATH": os.environ["PATH"], "PET_NNODES": "2"}
    refused = subprocess.run(["bash", "-c", script, *words], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and "PET_MASTER_ADDR: is set by the runtime" in refused.stderr


def test_skypilot(tmp_path: Path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    check_shape(task, SKY_TASK, "skypilot")
    assert "ports" not in task["resources"], "SkyPilot opens them to the internet"
    assert EXIT_CODES["preempted"] in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    told = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.5",
        "MOEDIST_VENV": str(tmp_path),
        **task["envs"],
    }
    for rank in (0, 1):
        said = run_script(task["run"], [], {**told, "SKYPILOT_NODE_RANK": str(rank)}, tmp_path)
        check_command(said, 2, "10.1.0.4:29400", rank == 0)
        assert "mesh.ep=8" in said and "run.resume=auto" in said


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "the number of nodes is not set. Set --nnodes, or NNODES."),
        ("--nnodes two", "the number of nodes is two. Set --nnodes, or NNODES."),
        ("--nnodes 2", "no host where the ranks meet. Set --host, or MASTER_ADDR, to the first node's address"),
        ("--nnodes 2 --host node0 --port x", "the port is x. Set --port, or MASTER_PORT"),
        ("--nnodes 2 --host node0 --node-rank first", "the node's rank is first. Set --node-rank, or NODE_RANK."),
        ("--nnodes 2 --host node0", "no run folder. Set run.dir=... to one that all nodes share."),
        ("--nnodes 2 --hosts node0 run.dir=x", "unknown option --hosts."),
        ("--nnodes", "--nnodes needs a value."),
    ],
)
def test_torchrun_refuses_what_it_would_have_to_guess(words: str, problem: str, tmp_path: Path):
    (tmp_path / "moedist").write_text("#!/bin/sh\n")
    (tmp_path / "moedist").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(LAUNCH / "torchrun.sh"), *words.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and problem in ended.stderr


def test_torchrun_takes_options_and_variables(tmp_path: Path):
    script = f'exec {shlex.quote(str(LAUNCH / "torchrun.sh"))} "$@"'
    options = ["--nnodes", "3", "--host", "fd00::7", "--local-addr", "fd00::8", "run.dir=/shared/run", "mesh.ep=4"]
    launch = compose(run_script(script, ["_", *options], {}, tmp_path)[1:]).config.launch
    assert (launch.nnodes, launch.rendezvous, launch.local_addr) == (3, "[fd00::7]:29400", "fd00::8")
    assert launch.holds_rendezvous is None
    told = {"NNODES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "2940", "NODE_RANK": "1"}
    check_command(run_script(script, ["_", "run.dir=/shared/run"], told, tmp_path), 2, "node0:2940", False)


def test_slurm_signals_before_the_limit_and_leaves_time_to_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"
    to, _, seconds = options["signal"].partition("@")
    assert to == "B:USR1" and int(seconds) > compose([]).config.launch.stop_after_s
    assert subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")]).returncode == 0


def test_a_slurm_job_must_be_able_to_come_back():
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "run.dir=/shared/first", "run.resume=/shared/other"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "run.resume is auto" in ended.stderr
