"""A checkpoint goes on at any layout: from four ranks to two, one and others, cut or whole, with all that it holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moedist.config import to_mapping
from moedist.launch.folder import claim_folder
from moedist.mesh import Mesh, MeshConfig
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.topk import TopKConfig
from moedist.train.checkpoint import read_meta
from moedist.train.checkpoint.manifest import folder_name, read_manifest
from moedist.train.checkpoint.saved import SavedState
from moedist.train.config import CheckpointConfig, RunConfig, RunFolder
from moedist.train.run import run_rank
from tests.ranks import Here
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, no_measuring, rows_of

SAVED, STEPS, EXPERTS = 6, 16, 12

# The global batch of 4 ranks: fewer ranks take as many micro-batches more, and the cut into capacity groups stays.
BIASED = dataclasses.replace(
    changed(
        CONFIG,
        train={
            "precision": "fp32",
            "steps": STEPS,
            "checkpoint_every": SAVED,
            "global_batch_tokens": 4 * ROWS * LENGTH,
        },
        moe={
            "num_experts": EXPERTS,
            "router": TopKConfig(top_k=2, score="sigmoid", noise_std=0.3),
            "balance": {"bias": BiasConfig(0.01), "switch": SwitchConfig(0.1, "micro_batch")},
        },
    ),
    checkpoint=CheckpointConfig(keep=None),
)
IDLE = changed(
    BIASED,
    moe={
        "router": ForcedConfig(top_k=2, pattern="one_empty"),
        "balance": {"switch": SwitchConfig(0.1, "micro_batch")},
    },
)

Layout = tuple[int, int, int | None]
"""World, ep, fsdp."""


def train(here: Here, config: RunConfig) -> int:
    with no_measuring():
        return run_rank(config, Path(config.run.dir or ""), here.mesh_of(config.mesh.ep, config.mesh.fsdp))


def run(ranks: Any, layout: Layout, config: RunConfig, folder: Path, resume: str = "never") -> Path:
    """The folder, once its run is done."""
    world, ep, fsdp = layout
    config = dataclasses.replace(config, run=RunFolder(str(folder), resume=resume), mesh=MeshConfig(ep=ep, fsdp=fsdp))
    claim_folder(config.run, to_mapping(config)).release()
    if world > 1:
        assert ranks(world).run(train, config, limit_s=300) == [0] * world
    else:
        with no_measuring():
            assert run_rank(config, folder, Mesh.alone()) == 0
    return folder


def saved(folder: Path, step: int) -> SavedState:
    path = folder / "checkpoints" / folder_name(step)
    return SavedState(path, read_manifest(path))


def goes_on(ranks: Any, whole: Path, layouts: list[Layout], config: RunConfig, tmp_path: Path) -> None:
    """From the checkpoint of ``whole`` at each layout: the first, which is its own, bitwise; the others within 1e-5."""
    expected = {step: row for step, row in rows_of(whole).items() if step > SAVED}
    for number, layout in enumerate(layouts):
        source = whole / "checkpoints" / folder_name(SAVED)
        folder = run(ranks, layout, config, tmp_path / "-".join(map(str, layout)), str(source))
        rows = rows_of(folder)
        assert len(rows) == STEPS - SAVED and rows.keys() == expected.keys()
        if number == 0:
            assert rows == expected
        for step, row in expected.items():
            assert rows[step]["train/loss"] == pytest.approx(row["train/loss"], rel=0, abs=1e-5), (layout, step)
            assert rows[step]["moe/layer_01/load"] == row["moe/layer_01/load"], (layout, step)
            for key in ("train/tokens", "train/lr_experts", "train/lr_router"):
                assert rows[step][key] == row[key]
        about = [read_meta(path / "checkpoints" / folder_name(STEPS)) for path in (folder, whole)]
        assert all(about[0][key] == about[1][key] for key in ("step", "tokens", "next_sample", "data_fingerprint"))
        end, other = saved(folder, STEPS), saved(whole, STEPS)
        for name in (name for name in other.tensors if not name.startswith("rank_")):
            difference = (end.read(name).double() - other.read(name).double()).abs().max()
            assert difference <= (0 if number == 0 else 1e-4), (layout, name)


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks, three experts on each."""
    return run(ranks, (4, 4, None), BIASED, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.pitfall("14", "29", "30")
def test_from_four_ranks_to_two_and_one(ranks, whole: Path, tmp_path: Path):
    """Twelve experts, Adam's moments, the balancing bias, step, schedule, data position."""
    state = saved(whole, SAVED)
    bias = state.read("model.blocks.1.ffn.moe.router.selection_bias")
    assert bias.dtype == torch.float32 and bias.abs().max() > 0
    moment = state.read("optimizer.blocks.1.ffn.moe.bank.experts.up.exp_avg")
    assert moment.shape[0] == EXPERTS and (moment.flatten(1).abs().amax(1) > 0).all()
    goes_on(ranks, whole, [(4, 4, None), (2, 2, None), (1, 1, None), (4, 2, None)], BIASED, tmp_path)


@pytest.mark.slow
def test_with_an_expert_that_is_never_asked(ranks, tmp_path: Path):
    """Its weights decay, its moments stay zero, at every layout."""
    whole = run(ranks, (4, 4, None), IDLE, tmp_path / "whole")
    assert all(row["moe/layer_01/load"][-1] == 0 for row in rows_of(whole).values())
    moment = saved(whole, SAVED).read("optimizer.blocks.1.ffn.moe.bank.experts.up.exp_avg_sq")
    assert (moment[-1] == 0).all() and (moment[:-1].flatten(1).amax(1) > 0).all()
    goes_on(ranks, whole, [(4, 4, None), (2, 2, None)], IDLE, tmp_path)


@pytest.mark.slow
def test_from_weights_that_are_cut_to_whole_ones_and_back(ranks, whole: Path, tmp_path: Path):
    cut = run(ranks, (4, 2, 4), BIASED, tmp_path / "cut")
    pieces = saved(cut, SAVED).tensors["model.blocks.0.attention.query.weight"].pieces
    assert pieces == 4 and saved(whole, SAVED).tensors["model.blocks.0.attention.query.weight"].pieces == 1
    goes_on(ranks, cut, [(4, 2, 4), (4, 4, None), (2, 2, 2), (1, 1, None)], BIASED, tmp_path)
    goes_on(ranks, whole, [(4, 4, None), (4, 2, 4)], BIASED, tmp_path / "back")
