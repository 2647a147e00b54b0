from __future__ import annotations

import json

from moedist.mesh import Mesh
from moedist.train.environment import describe_environment
from moedist.train.identity import Identity, identify

CONFIG = {"seed": 1, "train": {"steps": 10, "micro_batch": 2}, "mesh": {"ep": 1}}
META = {"run_id": "aaaa0000", "group_id": "aaaa0000", "config": CONFIG, "began_step": 0, "step": 5}


def test_a_fresh_run_begins_a_group():
    who, other = identify(None, False, CONFIG), identify(None, False, CONFIG)
    assert who.run_id == who.group_id != other.run_id and len(who.run_id) == 8
    assert who.began_step == 0


def test_a_restart_is_the_same_run_however_it_is_laid_out_and_long():
    longer = {**CONFIG, "train": {"steps": 20, "micro_batch": 2}, "mesh": {"ep": 4}}
    assert identify(META, True, longer) == Identity("aaaa0000", "aaaa0000", 0)
    older = {key: value for key, value in META.items() if key != "began_step"}  # of a version that did not keep it
    assert identify(older, True, CONFIG) == Identity("aaaa0000", "aaaa0000", 5)


def test_another_configuration_and_a_branch_are_new_runs_of_the_group():
    changed = {**CONFIG, "train": {"steps": 10, "micro_batch": 4}}
    for who in (identify(META, True, changed), identify(META, False, CONFIG)):
        assert who.run_id != who.group_id == "aaaa0000" and who.began_step == 5
    older = {key: value for key, value in META.items() if key != "group_id"}  # of a version without groups
    assert identify(older, False, CONFIG).group_id == "aaaa0000"


def test_the_environment_holds_no_secret(monkeypatch):
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "USER", "HOSTNAME"):
        monkeypatch.setenv(name, "canary-secret")
    found = describe_environment(Mesh.alone())
    assert "canary" not in json.dumps(found)
    assert found["packages"]["torch"] and found["ranks"] == 1
