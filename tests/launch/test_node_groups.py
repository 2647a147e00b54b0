"""Groups of experts that follow nodes: their number is worked out once, in the parent, and then belongs to the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moedist.config import ConfigError
from moedist.launch.compose import Composed, compose
from moedist.launch.folder import check_folder, claim_folder
from moedist.launch.node_groups import follow_nodes
from moedist.launch.saved import decode_saved, read_mapping
from moedist.mesh import Mesh
from moedist.mesh.nodes import nodes_per_ep_group
from moedist.moe.context import TokenContext
from moedist.moe.token_choice import group_notes
from moedist.train.build import build_model
from moedist.train.run import greet
from tests.train.tiny import CONFIG

PER_NODE = "moe.router.groups={per_node: true, top_groups: 1}"
BASE = ["experiment=null", "data=synthetic", "moe.num_experts=8"]


def composed(*overrides: str) -> Composed:
    return compose([*BASE, PER_NODE, *overrides])


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "number"), [(8, 4, 2), (4, 1, 4), (4, 4, 1), (2, 4, 1), (4, 2, 2), (1, 1, 1)]
)
def test_their_number_is_in_the_config_that_ranks_read(ep: int, ranks_per_node: int, number: int, tmp_path: Path):
    top_k = 1 if number == 4 else 2
    found = follow_nodes(
        composed(f"mesh.ep={ep}", f"moe.router.top_k={top_k}", f"run.dir={tmp_path / 'run'}"), ranks_per_node
    )
    claim = claim_folder(found.config.run, found.mapping)
    claim.release()
    for config in (found.config, decode_saved(read_mapping(claim.path / "config.yaml"))):
        groups = config.moe.router.groups
        assert (groups.num_groups, groups.top_groups, groups.per_node) == (number, 1, True)


def test_other_configurations_come_back_as_they_are():
    plain = compose([*BASE, "moe.router.groups={num_groups: 4, top_groups: 2}"])
    assert follow_nodes(plain, 1) is plain


def test_more_groups_may_be_wanted_than_there_are_nodes():
    wanted = compose([*BASE, "mesh.ep=4", "moe.router.groups={per_node: true, top_groups: 3}"])
    assert follow_nodes(wanted, 2).config.moe.router.groups.num_groups == 2


def test_nodes_that_are_not_what_was_started():
    assert follow_nodes(composed("mesh.ep=4", "mesh.ranks_per_node=2"), 4).config.moe.router.groups.num_groups == 2


def test_layers_of_their_own_are_found():
    block = "{ffn: {kind: moe, moe: {num_experts: 4, router: {kind: topk, groups: {per_node: true}}}}}"
    found = follow_nodes(composed("mesh.ep=4", "model/layers=listed", f"model.layers.blocks=[{{}}, {block}]"), 2)
    assert found.config.model.layers.blocks[1].ffn.moe.router.groups.num_groups == 2
    assert found.mapping["model"]["layers"]["blocks"][1]["ffn"]["moe"]["router"]["groups"]["num_groups"] == 2


@pytest.mark.parametrize("resume", ["auto", "branch"])
def test_a_resume_at_another_layout_keeps_the_routing(resume: str, tmp_path: Path):
    first = follow_nodes(composed("mesh.ep=4", f"run.dir={tmp_path / 'run'}"), 2)
    claim = claim_folder(first.config.run, first.mapping)
    claim.release()
    (claim.path / "checkpoints" / "step_00000001").mkdir()
    (claim.path / "checkpoints" / "step_00000001" / "manifest.json").touch()
    where = {"auto": claim.path, "branch": tmp_path / "other"}[resume]
    come_from = {"auto": "auto", "branch": str(claim.path)}[resume]
    again = follow_nodes(composed("mesh.ep=2", f"run.dir={where}", f"run.resume={come_from}"), 4)
    assert again.config.moe.router.groups.num_groups == 2
    assert check_folder(again.config.run, again.mapping) == []  # nothing has changed


def test_groups_that_begin_inside_a_node_are_refused():
    with pytest.raises(ConfigError) as caught:
        follow_nodes(composed("mesh.ep=6"), 4)
    said = str(caught.value)
    assert said.startswith("mesh.ep = 6 ") and "a divisor or a multiple of 4" in said and "moe.router.groups" in said


def test_what_does_not_fit_the_experts_is_refused_with_its_key():
    with pytest.raises(ConfigError) as caught:
        follow_nodes(composed("mesh.ep=8", "moe.router.top_k=2"), 1)  # one expert per node, two wanted
    assert caught.value.key == "moe.router.groups.top_groups" and "leaves 1 experts" in str(caught.value)


def test_a_rank_group_started_by_hand_counts_its_own_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moedist.train.__main__ import _decide

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    decision = _decide([*BASE, PER_NODE, "mesh.ep=4", f"run.dir={tmp_path / 'run'}"], 4)
    assert decision["mapping"]["moe"]["router"]["groups"]["num_groups"] == 2


def test_outside_of_a_launched_run_the_number_must_be_said():
    layer = composed().config.moe.build(4)
    with pytest.raises(ConfigError) as caught:
        layer(layer.router.weight.new_zeros(2, 4), TokenContext.of_rows(1, 2))
    assert caught.value.key == "moe.router.groups.num_groups"


@pytest.mark.parametrize(
    ("num_groups", "num_nodes", "said"),
    [
        (4, 4, "a token is sent to at most 2 of 4"),
        (1, 1, "nothing is limited"),
        (
            4,
            2,
            "keeps the 4 groups of experts of the run's first start, one per node; an expert-parallel group spans 2",
        ),
        (4, None, "begins or ends inside a node"),
    ],
)
def test_the_start_of_a_run_says_it(num_groups, num_nodes, said, monkeypatch: pytest.MonkeyPatch):
    groups = dataclasses.replace(compose([*BASE, PER_NODE]).config.moe.router.groups, num_groups=num_groups)
    groups = dataclasses.replace(groups, top_groups=2, score="max")
    router = dataclasses.replace(CONFIG.moe.router, groups=groups)
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router=router))
    source = config.data.open()
    spread = build_model(config, source.vocab_size, Mesh.alone())
    (line,) = group_notes(spread.model, num_nodes)
    assert said in line
    lines: list[str] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    log = type("Log", (), {"say": staticmethod(lines.append)})()
    greet(log, config, source, spread, Mesh.alone(), None)
    (expected,) = group_notes(spread.model, nodes_per_ep_group(1, 1))
    assert f"note   {expected}" in lines
