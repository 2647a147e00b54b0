from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedist.cli.main import main
from moedist.launch.compose import compose, compose_onto
from moedist.launch.evaluation import plan_evaluation, without_limits
from moedist.train.checkpoint.manifest import FileSeal, Manifest, folder_name, write_manifest
from moedist.train.status import Status

Output = pytest.CaptureFixture[str]
TRAINED = [
    "experiment=null",
    "data=synthetic",
    "data.num_tokens=5000",
    "launch.nproc=2",
    "mesh.ep=2",
    "mesh.device=cpu",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints, the newer one cut short."""
    config = compose([*TRAINED, "moe.capacity.eval_factor=2.0", f"run.dir={tmp_path}"]).mapping
    for step in (3, 6):
        path = tmp_path / "checkpoints" / folder_name(step)
        path.mkdir(parents=True)
        (path / "shard").write_bytes(b"weights")
        write_manifest(path, Manifest(step, 2, {"shard": FileSeal.of(path / "shard")}, {"config": config}))
    (tmp_path / "checkpoints" / folder_name(6) / "shard").write_bytes(b"we")
    return tmp_path


def test_the_newest_whole_checkpoint_is_measured_dropless(run: Path):
    plan = plan_evaluation(run)
    assert plan.checkpoint == run / "checkpoints" / folder_name(3)
    capacity = plan.composed.config.moe.capacity
    assert capacity.dropless and (capacity.factor, capacity.eval_factor) == (None, "train")
    assert Path(plan.composed.config.run.dir).parent == run / "eval"
    assert (plan.composed.config.launch.nproc, plan.composed.config.launch.nnodes) == (2, 1)
    assert plan_evaluation(plan.checkpoint).checkpoint == plan.checkpoint


def test_overrides_have_the_last_word(run: Path):
    config = plan_evaluation(run, ["moe.capacity.factor=1.5", "train.eval_batches=3", "mesh.ep=1"]).composed.config
    assert (config.moe.capacity.factor, config.train.eval_batches, config.mesh.ep) == (1.5, 3, 1)


def test_a_run_of_many_nodes_is_measured_on_the_ranks_of_one(tmp_path: Path, capsys: Output):
    """Nobody must know the layout of a run to measure it: experts and pieces of weights go to the ranks there are."""
    nodes = ["launch.nnodes=4", "launch.nproc=2", "launch.rendezvous=node0:29400"]
    trained = [*TRAINED, *nodes, "mesh.ep=4", "mesh.fsdp=8", "mesh.ranks_per_node=2", f"run.dir={tmp_path}"]
    path = tmp_path / "checkpoints" / folder_name(3)
    path.mkdir(parents=True)
    write_manifest(path, Manifest(3, 8, {}, {"config": compose(trained).mapping}))
    plan = plan_evaluation(tmp_path)
    mesh = plan.composed.config.mesh
    assert (plan.ranks.world_size, mesh.ep, mesh.fsdp, mesh.ranks_per_node) == (2, 2, 2, 2)
    assert plan_evaluation(tmp_path, ["launch.nproc=8"]).composed.config.mesh.ep == 4
    assert main(["eval", str(tmp_path), "--dry-run", "launch.nproc=3"]) == 0
    assert main(["eval", str(tmp_path), "--dry-run", "mesh.fsdp=4"]) == 2
    assert "mesh.fsdp = 4 does not divide the 2 ranks launched" in capsys.readouterr().err


def test_limits_of_single_layers_go_too():
    layer = {"ffn": {"moe": {"capacity": {"factor": 1.0, "expert_capacity": 4, "eval_factor": None, "group": "rank"}}}}
    (plain,) = without_limits([layer])
    no_limit = {"factor": None, "final_factor": None, "expert_capacity": None, "eval_factor": "train"}
    assert plain["ffn"]["moe"]["capacity"] == {**no_limit, "group": "rank"}


def test_a_factor_that_moves_is_taken_off_too():
    moving = compose([*TRAINED, "moe.capacity.final_factor=2.0"])
    assert (
        compose_onto(without_limits(moving.mapping)).config.moe.capacity == moving.config.moe.capacity.without_limit()
    )


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output):
    calls = []

    def run_ranks(ranks, launch, run_dir, target, *, lock=None, terminal=None) -> Status:
        calls.append((ranks.world_size, run_dir, target))
        return Status("done", 0, "held-out loss 1.0")

    monkeypatch.setattr("moedist.launch.start.run_ranks", run_ranks)
    assert main(["eval", str(run), "--dry-run", "--json", "launch.nproc=4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ranks"] == 4 and facts["checkpoint"].endswith(folder_name(3))
    assert calls == [] and not (run / "eval").exists()
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["message"] == "held-out loss 1.0"
    ((world_size, folder, target),) = calls
    assert world_size == 2 and folder.parent == run / "eval"
    checkpoint = str(run / "checkpoints" / folder_name(3))
    assert target == ["moedist.train", str(folder / "config.yaml"), "--eval", checkpoint]


def test_what_cannot_be_measured(run: Path, tmp_path: Path, capsys: Output):
    (tmp_path / "empty").mkdir()
    assert main(["eval", str(tmp_path / "empty")]) == 2
    assert "is no checkpoint and holds none. Name a run folder" in capsys.readouterr().err
    assert main(["eval", str(run), "mesh.ep=3"]) == 2
    assert "mesh.ep = 3 does not divide the 2 ranks launched" in capsys.readouterr().err
    (run / "checkpoints" / folder_name(3) / "manifest.json").write_text("{}")
    assert main(["eval", str(run / "checkpoints" / folder_name(3))]) == 2
    assert "cannot be read" in capsys.readouterr().err
