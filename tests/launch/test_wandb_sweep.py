"""launch/wandb_sweep.yaml: what W&B's agent makes of it is a command that trains."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from moedist.cli.main import parse
from moedist.launch.compose import compose
from tests.end_to_end.runs import TINY
from tests.launch.namespaces import ROOT, environment

SWEEP = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
CHOSEN = {"moe.capacity.factor": 1.25, "moe/router": "noisy", "train.optimizer.experts_lr": 0.00123}


def agents_command(words: list[str], chosen: dict[str, object]) -> list[str]:
    """The arguments that an agent puts in the places of ``command``, by its own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    given = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    given |= {"env": ["/usr/bin/env"], "program": [SWEEP["program"]]}
    made: list[str] = []
    for word in words:
        made += given[word[2:-1]] if word.startswith("${") else [word]
    return made


@pytest.mark.parametrize("arguments", ["${args_no_hyphens}", "${args}"])
def test_the_agents_command_is_understood(arguments: str):
    assert set(CHOSEN) == set(SWEEP["parameters"])
    words = [arguments if word == "${args_no_hyphens}" else word for word in SWEEP["command"]]
    command = agents_command(words, CHOSEN)
    assert command[:3] == ["/usr/bin/env", "moedist", "train"]
    config = compose(parse(command[2:]).overrides).config
    assert (config.moe.capacity.factor, config.moe.router.kind) == (1.25, "noisy")
    assert config.train.optimizer.experts_lr == 0.00123
    assert config.train.eval_every is not None, "the server waits for eval/loss"


@pytest.mark.slow
def test_an_agent_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The agent's own process, without a server: its environment, its working directory, its command."""
    from wandb.wandb_agent import Agent

    for name, value in environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_SWEEP_ID", "tiny")
    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    agent = Agent(api=None, queue=None, sweep_id="tiny")
    fixed = [*(word for word in TINY if "log/sink" not in word), "train.steps=8", "train.eval_every=4"]
    agent._sweep_command = [
        word for old in SWEEP["command"] for word in (fixed if old == "experiment=tiny_cpu" else [old])
    ]
    args = {name: {"value": value} for name, value in CHOSEN.items()}
    agent._command_run({"run_id": "first", "program": SWEEP["program"], "args": args})
    assert agent._run_processes["first"].wait() == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "status.json").read_text())["reason"] == "done"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (written["moe"]["capacity"]["factor"], written["moe"]["router"]["kind"]) == (1.25, "noisy")
    assert os.listdir(folder / "wandb"), "no record for the server"
