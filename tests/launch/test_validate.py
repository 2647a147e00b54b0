from __future__ import annotations

from pathlib import Path

import pytest

from moedist.config import ConfigErrors
from moedist.launch.compose import compose
from moedist.launch.validate import validate, validate_dry_run, validate_evaluation

SMALL = ["experiment=null", "train.sequence_length=16", "train.micro_batch=2"]
SYNTHETIC = ["data=synthetic", "data.num_tokens=5000"]


def errors_of(*overrides: str, world_size: int = 4, check=validate) -> dict[str, str]:
    source = [] if any(override.startswith("data=") for override in overrides) else SYNTHETIC
    composed = compose([*SMALL, *source, *overrides])
    with pytest.raises(ConfigErrors) as caught:
        check(composed.config, composed.mapping, world_size)
    return {error.key: str(error) for error in caught.value.errors}


def test_what_fits_gives_the_opened_corpus(tmp_path: Path):
    composed = compose(
        [*SMALL, *SYNTHETIC, "mesh.ep=2", f"run.dir={tmp_path / 'run'}", "train.global_batch_tokens=256"]
    )
    assert validate(composed.config, composed.mapping, 4).vocab_size == 1024
    assert not (tmp_path / "run").exists()


def test_everything_that_does_not_fit_is_said_at_once():
    errors = errors_of("mesh.ep=3", "train.global_batch_tokens=300", "run.resume=auto")
    assert set(errors) == {"mesh.ep", "moe.num_experts", "train.global_batch_tokens", "run.resume"}
    assert "mesh.ep = 3 does not divide the 4 ranks launched. Set mesh.ep to 1, 2 or 4" in errors["mesh.ep"]
    assert "Set train.global_batch_tokens to 256 or 384." in errors["train.global_batch_tokens"]


def test_experts_and_ranks_that_do_not_fit():
    errors = errors_of("moe.num_experts=6", "mesh.ep=4")
    assert "moe.num_experts = 6 cannot be cut into 4 equal parts" in errors["moe.num_experts"]
    assert "moe.bank" in str(errors_of("moe/bank=local", "mesh.ep=2"))


def test_a_block_s_own_experts_are_refused_under_their_own_key():
    """Where the run's layer would do and a listed block brings another."""
    block = "model.layers.blocks=[{{}},{{ffn:{{kind:moe,moe:{{{}}}}}}}]"
    router = "capacity:{factor:null},balance:{},router:{kind:sinkhorn}"
    with pytest.raises(ConfigErrors) as caught:
        compose([*SMALL, *SYNTHETIC, "model/layers=listed", block.format(router)])
    (error,) = caught.value.errors
    assert error.key == "model.layers.blocks.1.ffn.moe.router.kind" and "the model is causal" in str(error)
    errors = errors_of("model/layers=listed", block.format("num_experts:6"), "mesh.ep=4")
    assert set(errors) == {"model.layers.blocks.1.ffn.moe.num_experts"}
    errors = errors_of("model/layers=listed", block.format("num_experts:4"))
    assert "is not the 8 of the run's layer" in errors.pop("model.layers.blocks.1.ffn.moe.num_experts") and not errors
    errors = errors_of("moe/router=sinkhorn", "moe/balance=[]")
    assert set(errors) == {"moe.router.kind"}


def test_data_that_is_missing_or_short(tmp_path: Path):
    assert "data.files" in errors_of("data=text", f"data.files={tmp_path / 'gone.txt'}")
    assert "data.files" in errors_of("data=text")
    assert "train.sequence_length" in errors_of("train.sequence_length=8000")
    assert "train.global_batch_tokens" in errors_of("train.micro_batch=200")


def test_evaluations_need_held_out_tokens(tmp_path: Path):
    (tmp_path / "text.txt").write_text("some words " * 40)
    overrides = ["data=text", f"data.files={tmp_path / 'text.txt'}", "data.holdout_every=null", "mesh.ep=3"]
    errors = errors_of(*overrides, check=validate_evaluation)
    assert set(errors) == {"data", "mesh.ep", "moe.num_experts"}
    assert "holds out 0 tokens" in errors["data"]


def test_several_nodes_need_a_meeting_point_to_start_and_none_to_plan():
    assert "says no meeting point for 2 nodes" in errors_of("launch.nnodes=2")["launch.rendezvous"]
    composed = compose([*SMALL, *SYNTHETIC, "launch.nnodes=2"])
    assert validate_dry_run(composed.config, composed.mapping, 8).vocab_size == 1024


def test_a_plan_of_several_nodes_needs_no_data_where_the_ids_are_known():
    elsewhere = ["launch.nnodes=2", "data=tokens", "data.files=/elsewhere/*.bin", "data.vocab_size=50304"]
    composed = compose([*SMALL, *elsewhere])
    data = validate_dry_run(composed.config, composed.mapping, 8)
    assert data.vocab_size == 50304 and data.describe().startswith("not ready on this machine: data.files = ")
    errors = errors_of(*elsewhere, "launch.nnodes=1", check=validate_dry_run)
    assert set(errors) == {"data.files"}, "a run of this machine needs its data here"
    errors = errors_of(*elsewhere, "data.vocab_size=null", "mesh.ep=3", check=validate_dry_run)
    assert set(errors) == {"data.vocab_size", "mesh.ep", "moe.num_experts"}


def test_a_plan_of_many_ranks_says_that_the_corpus_is_short():
    composed = compose([*SMALL, *SYNTHETIC, "launch.nnodes=128"])
    assert "takes 2048 samples per step" in validate_dry_run(composed.config, composed.mapping, 1024).describe()


def test_groups_of_experts_that_do_not_lie_on_whole_nodes():
    errors = errors_of("mesh.ep=4", "mesh.ranks_per_node=3", "moe/dispatch=hierarchical")
    assert set(errors) == {"mesh.ranks_per_node", "moe.dispatch.once_per"}
    assert "groups of 4 ranks begin or end inside a node of 3" in errors["moe.dispatch.once_per"]


def test_weights_that_cannot_be_cut_or_offloaded():
    errors = errors_of("mesh.ep=2", "mesh.fsdp=8", "engine.offload=true")
    assert (
        "mesh.fsdp = 8 does not divide the 4 ranks launched. Set mesh.fsdp to 2 or 4 or to null" in errors["mesh.fsdp"]
    )
    assert "needs weights that are cut" in errors_of("engine.offload=true")["engine.offload"]


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CXX", "icpx -O1")
    errors = errors_of("train.compile=blocks")
    assert "needs a C++ compiler, and this machine has none of icpx, g++, clang++" in errors["train.compile"]
