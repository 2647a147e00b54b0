"""What a plan says of ranks that are not there, held against ranks that are."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moedist.mesh import MeshConfig
from moedist.mesh.fake import fake_mesh
from moedist.moe.experts.loop import LoopConfig
from moedist.train.build import build_engine, build_model
from moedist.train.dry_run import DryRun, chosen_ranks, dry_run, num_bytes, tensors
from moedist.train.layout import Layout, check_cover, check_whole
from tests.ranks import Here
from tests.train.tiny import CONFIG, changed, in_folder

VOCAB_SIZE = CONFIG.data.vocab_size


def plan_of(world_size: int, **mesh: Any) -> DryRun:
    config = in_folder(CONFIG, "nowhere")
    return dry_run(changed_mesh(config, **mesh), VOCAB_SIZE, world_size)


def changed_mesh(config: Any, **mesh: Any) -> Any:
    return dataclasses.replace(config, mesh=MeshConfig(**mesh))


def held(
    here: Here, ep: int, fsdp: int | None
) -> tuple[dict[str, tuple[int, ...]], list[int], list[tuple[int, ...]], dict[str, Any]]:
    """Local shapes, bytes, experts and groups of a real rank after its engine has made the optimizer's state."""
    mesh = here.mesh_of(ep, fsdp)
    config = changed_mesh(CONFIG, ep=ep, fsdp=fsdp)
    spread = build_model(config, VOCAB_SIZE, mesh)
    engine = build_engine(config, spread, mesh)
    locals_of = {
        name: parameter.to_local() if hasattr(parameter, "to_local") else parameter
        for name, parameter in spread.model.named_parameters()
    }
    state = engine.state()
    sizes = [sum(part.nbytes for part in locals_of.values()), num_bytes(tensors(state["optimizer"]))]
    experts = [tuple(block.ffn.moe.bank.experts.expert_ids) for block in spread.model.blocks[1:]]
    groups = {axis.name: tuple(dist.get_process_group_ranks(axis.group)) for axis in mesh.axes()}
    return {name: tuple(part.shape) for name, part in locals_of.items()}, sizes, experts, groups


@pytest.mark.parametrize(("ep", "fsdp"), [(1, None), (2, None), (4, None), (2, 4), (2, 2), (1, 4)])
def test_a_plan_is_what_real_ranks_hold(ranks, ep: int, fsdp: int | None):
    real = ranks(4).run(held, ep, fsdp)
    plan = plan_of(4, ep=ep, fsdp=fsdp)
    assert [rank.rank for rank in plan.ranks] == {1: [0, 1, 3], 2: [0, 1, 2, 3], 4: [0, 3]}[ep]
    for rank in plan.ranks:
        shapes, sizes, experts, groups = real[rank.rank]
        assert rank.shapes == shapes
        assert [rank.weight_bytes, rank.optimizer_bytes] == sizes and rank.gradient_bytes == sizes[0]
        assert list(rank.experts.values()) == experts and list(rank.experts) == [1, 2]
        assert rank.groups == groups


def test_eight_ranks_add_up_to_the_model():
    plan = plan_of(8, ep=4)
    assert [rank.rank for rank in plan.ranks] == [0, 3, 4, 7]
    assert plan.ranks[2].groups == {"dp": tuple(range(8)), "ep": (4, 5, 6, 7), "edp": (0, 4)}
    assert plan.ranks[1].experts == {1: (6, 7), 2: (6, 7)}
    up = "blocks.1.ffn.moe.bank.experts.up"
    assert plan.parameters[up] == Layout((8, 16, 12), pieces=4, copies=2)
    assert plan.parameters["head.weight"] == Layout((VOCAB_SIZE, 16), pieces=1, copies=8)
    whole = CONFIG.model.build(VOCAB_SIZE, CONFIG.moe, device="meta")
    assert plan.num_parameters == sum(parameter.numel() for parameter in whole.parameters())


def test_pieces_of_six_ranks_that_divide_nothing_evenly():
    """Neither the width nor the experts' own divides by 3: an expert rank's 4 experts are cut into 2, 2 and none."""
    config = changed(changed_mesh(CONFIG, ep=2, fsdp=6), moe={"experts": LoopConfig(hidden_dim=13)})
    plan = dry_run(config, VOCAB_SIZE, 6)
    up = "blocks.1.ffn.moe.bank.experts.up"
    assert plan.parameters[up] == Layout((8, 16, 13), pieces=6, copies=1)
    assert [rank.shapes[up] for rank in plan.ranks] == [(2, 16, 13), (2, 16, 13), (2, 16, 13), (0, 16, 13)]
    assert plan.parameters["norm.weight"] == Layout((16,), pieces=6, copies=1)
    assert [rank.shapes["norm.weight"] for rank in plan.ranks] == [(3,), (3,), (3,), (1,)]


def test_replicas_add_a_rank_to_the_plan():
    assert [rank.rank for rank in plan_of(16, ep=2, fsdp=8).ranks] == [0, 1, 2, 8, 15]


def test_a_plan_leaves_nothing_behind():
    hook = sys.excepthook
    first = plan_of(8, ep=2)
    assert not dist.is_initialized() and sys.excepthook is hook
    assert plan_of(8, ep=2).ranks == first.ranks


def test_which_ranks_are_built():
    assert chosen_ranks(MeshConfig(ep=64), 1024) == [0, 63, 64, 1023]
    assert chosen_ranks(MeshConfig(), 1) == [0]


PIECES = [((0, 2), (0, 3)), ((2, 2), (0, 3)), ((0, 2), (3, 1)), ((2, 2), (3, 1))]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (PIECES[:3], "pieces are missing"),
        (PIECES[:1], "does not tile 4"),
        ([*PIECES[:3], ((2, 2), (2, 2))], "does not tile 4"),
        ([((0, 3), (0, 4)), ((2, 2), (0, 4))], "does not tile 4"),
    ],
)
def test_pieces_that_do_not_cover_the_whole(pieces: list, said: str):
    check_cover((4, 4), frozenset([*PIECES, ((4, 0), (0, 3))]))
    with pytest.raises(AssertionError, match=said):
        check_cover((4, 4), frozenset(pieces))


def sliced_by_hand(model: nn.Module) -> None:
    """Half of the experts under the old name, and no one knows that it is a half."""
    experts = model.blocks[1].ffn.moe.bank.experts
    experts.up = nn.Parameter(torch.empty_like(experts.up.to_local()))


def other_experts(model: nn.Module) -> None:
    model.blocks[1].ffn.moe.bank.experts.expert_ids = (0, 1, 2, 5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(sliced_by_hand, r"experts.up is \(4, 16, 12\), and whole \(8, 16, 12\)"), (other_experts, "are not 4 to 8")],
)
def test_a_model_that_is_not_all_there_is_seen(spoil: Any, said: str):
    config = changed_mesh(CONFIG, ep=2)
    model = config.model.build(VOCAB_SIZE, config.moe, device="meta")
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with fake_mesh(config.mesh, 3, 4) as mesh:
        spread = build_model(config, VOCAB_SIZE, mesh)
        check_whole(spread, whole, 4)
        spoil(spread.model)
        with pytest.raises(AssertionError, match=said):
            check_whole(spread, whole, 4)
