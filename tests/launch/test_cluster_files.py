"""The files of launch/ for schedulers, as far as they can be held without one: shape, keys, and what they run."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moedist.cli.doctor import CHECKS
from moedist.cli.main import parse
from moedist.launch.compose import compose
from moedist.train.config import RunConfig
from moedist.train.status import EXIT_CODES

LAUNCH = Path(__file__).parents[2] / "launch"

COMMAND = r'moedist"? ((?:train|eval|report|runs|analyze|doctor|estimate|bench|checkpoint)(?: .*)?)$'
"""Of moedist, as scripts call it or tell users to."""
SLURM = {
    "scontrol": '[[ $2 == hostnames ]] && echo node0 || echo "NodeName=node0 NodeAddr=10.0.0.1 NodeHostName=node0"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 exec "$@"',
}
"""Stands for SLURM, with a task that runs here."""

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


def accepted(said: list[str]) -> RunConfig:
    """The configuration of a command that moedist accepts: flags, keys, values, and the parts against each other."""
    args = parse(said)
    assert args.command in ("train", "doctor"), said
    config = compose([text for text in args.overrides if args.command == "train" or text not in CHECKS]).config
    config.launch.check_start()
    config.mesh.check_world(config.launch.nnodes * (config.launch.nproc or 8))
    return config


def check_command(said: list[str], nnodes: int, rendezvous: str, holds: bool) -> RunConfig:
    """``said`` is a training of ours that names the cluster which the scheduler told of."""
    assert said[0] == "train"
    config = accepted(said)
    launch = config.launch
    assert (launch.nnodes, launch.rendezvous, launch.holds_rendezvous) == (nnodes, rendezvous, holds)
    assert config.run.dir is not None, "nodes share a folder"
    assert getattr(config.data, "files", True), "the corpus is named"
    return config


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
        config = check_command(said, 2, "job-node-0-0.job:29400", rank == 0)
        assert config.run.resume == "auto"
        assert pod["terminationGracePeriodSeconds"] > config.launch.stop_after_s
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
        config = check_command(said, 2, "10.1.0.4:29400", rank == 0)
        assert (config.mesh.ep, config.run.resume) == (8, "auto")


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
    launch = accepted(run_script(script, ["_", *options], {}, tmp_path)).launch
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


def test_a_slurm_job_gives_commands_that_are_accepted(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    told = {
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NUM_NODES": "2",
    }
    script = f'source {shlex.quote(str(LAUNCH / "slurm.sbatch"))} "$@"'
    given = ["run.dir=/shared/runs/first", "experiment=tiny_cpu", "mesh.ep=4"]
    _, *said = run_script(script, ["_", *given], told, tmp_path)
    preflight, training = said[: said.index("train")], said[said.index("train") :]
    assert preflight[:2] == ["doctor", "machine"] and accepted(preflight).mesh.ep == 4
    config = check_command(training, 2, "10.0.0.1:20123", True)
    assert (config.mesh.ep, config.run.resume) == (4, "auto")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_commands_in_scripts_are_accepted(path: Path):
    for line in re.findall(COMMAND, path.read_text(), re.MULTILINE):
        words = list(itertools.takewhile(lambda word: not re.match(r"[|&>]", word), shlex.split(line)))
        args = parse([word.replace("$run_dir", "runs/first") for word in words if word != "$@"])
        if args.command == "train":
            compose([text.replace("$folder", "folder") for text in args.overrides])
