"""A run's routing recorded at one layout and replayed at others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moedist.config import ConfigError, to_mapping
from moedist.launch.compose import compose
from moedist.launch.folder import claim_folder
from moedist.launch.validate import validate
from moedist.log.config import TraceConfig
from moedist.mesh import Mesh
from moedist.moe.router.replay import ReplayConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.trace import open_trace, read_step
from moedist.train.run import run_rank
from tests.ranks import Here
from tests.rows import read_rows
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, in_folder, make_trainer, no_measuring

STEPS = 3
# The limit looks at positions alone, so that the pairs that stay follow from the experts, not from learned scores.
RECORDED = changed(
    CONFIG,
    capacity={"drop_policy": "token"},
    train={"global_batch_tokens": 4 * ROWS * LENGTH, "activation_checkpointing": "full"},
    log={"trace": TraceConfig(steps=(1, 3), every=2)},
)


def replaying(folder: Path, **keys: Any) -> Any:
    router = ReplayConfig(top_k=2, trace=str(folder), **keys)
    return changed(RECORDED, moe={"router": router}, log={"trace": TraceConfig()})


class Said:
    """Stands for the run's log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def steps(here: Here, ep: int, config: Any, traces: Path | None = None) -> list[dict[str, Any]]:
    """Counts, loss and gradient norm of each step."""
    mesh = here.mesh_of(ep) if here.world > 1 else Mesh.alone()
    trainer = make_trainer(config, config.data.open(), mesh, traces=traces)
    loader, found, log = trainer.loader(), [], Said()
    for _ in range(STEPS):
        assert trainer.step(loader)
        trainer.write_trace(log)  # type: ignore[arg-type]
        total = trainer.tally.reduce(mesh.dp)
        found.append({"count": total.moe.count_LME, "loss": total.loss, "norm": trainer.grad_norm})
    assert log.lines == []
    return found


@pytest.fixture(scope="module")
def recorded(ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Three steps of two ranks at EP=2, with noise, dropping and activation checkpointing, recorded whole."""
    folder = tmp_path_factory.mktemp("recorded")
    return folder, ranks(2).run(steps, 2, RECORDED, folder)[0]


LAYOUTS = [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow), (4, 4)]


def run_at(ranks: Any, world: int, ep: int, config: Any) -> list[dict[str, Any]]:
    return steps(Here(0, 1), 1, config) if world == 1 else ranks(world).run(steps, ep, config)[0]


def test_the_trace_is_what_the_run_counted(recorded):
    folder, run = recorded
    index = open_trace(folder)
    assert list(index.steps) == [1, 2, 3] and list(index.layers) == [1, 2]
    for step, counted in zip(index.steps, run, strict=True):
        trace = read_step(index.steps[step])
        names = set(zip(trace.sample_T.tolist(), trace.position_T.tolist(), strict=True))
        assert len(names) == trace.sample_T.numel() == 4 * ROWS * LENGTH, "every token once"
        for place, layer in enumerate(trace.layers.values()):
            asked, kept, full, *others = counted["count"][place]
            assert torch.equal(torch.bincount(layer.expert_TK.flatten(), minlength=8), asked)
            assert torch.equal(torch.bincount(layer.computed_TK[layer.kept_TK], minlength=8), kept)
            assert torch.equal(torch.bincount(layer.expert_TK[~layer.kept_TK], minlength=8), full)
            assert full.sum() > 0 and not any(other.any() for other in others), "the run must drop pairs"


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_every_layout_replays_the_same_experts(ranks, recorded, world: int, ep: int):
    """Without the noise that the recorded run had, so that the learned scores alone would choose others."""
    folder, run = recorded
    for got, expected in zip(run_at(ranks, world, ep, replaying(folder)), run, strict=True):
        assert torch.equal(got["count"], expected["count"])


def test_the_learned_scores_alone_would_choose_others(recorded):
    plain = changed(RECORDED, moe={"router": TopKConfig(top_k=2)}, log={"trace": TraceConfig()})
    assert not torch.equal(steps(Here(0, 1), 1, plain)[0]["count"], recorded[1][0]["count"])


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_a_replay_with_the_run_s_own_noise_is_the_run(ranks, recorded, world: int, ep: int):
    """Losses and gradient norms, three updates long."""
    folder, run = recorded
    for got, expected in zip(run_at(ranks, world, ep, replaying(folder, noise_std=0.3)), run, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-12, rel=0)
        assert got["norm"] == pytest.approx(expected["norm"], rel=1e-10)


def test_one_recorded_step_serves_a_benchmark_of_any_length(recorded):
    folder, run = recorded
    one = folder / "step_00000002"
    got = steps(Here(0, 1), 1, replaying(one, cycle=True))
    asked = run[1]["count"][:, 0]
    assert all(torch.equal(step["count"][:, 0], asked) for step in got)
    with pytest.raises(RuntimeError, match="was not recorded"):
        steps(Here(0, 1), 1, replaying(one))
    longer = {"sequence_length": 2 * LENGTH, "global_batch_tokens": 8 * ROWS * LENGTH}
    got = steps(Here(0, 1), 1, changed(replaying(one, cycle=True), train=longer))
    assert all(torch.equal(step["count"][:, 0], 2 * asked) for step in got), "positions go round as rows do"


def test_other_data_is_said(recorded):
    with pytest.raises(RuntimeError, match="another id"):
        steps(Here(0, 1), 1, dataclasses.replace(replaying(recorded[0]), seed=6))


def test_a_trace_that_cannot_be_written_costs_a_warning(tmp_path: Path):
    (tmp_path / "traces").write_text("a file where the folder should be")
    trainer = make_trainer(RECORDED, RECORDED.data.open(), Mesh.alone(), traces=tmp_path / "traces")
    log = Said()
    assert trainer.step(trainer.loader())
    trainer.write_trace(log)  # type: ignore[arg-type]
    (line,) = log.lines
    assert line.startswith("Warning: the routing of step 1 is not recorded") and line.endswith("The run goes on.")


def test_a_run_and_its_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The whole way of a rank: config, files below the run, label, equal losses; an evaluation in between."""
    train = {"steps": 2, "eval_every": 1, "eval_batches": 1, "checkpoint_every": None, "log_every": 1}
    first = in_folder(changed(RECORDED, train=train), tmp_path / "first")
    again = in_folder(changed(replaying(tmp_path / "first", noise_std=0.3), train=train), tmp_path / "again")
    records = []
    for config in (first, again):
        claim = claim_folder(config.run, to_mapping(config))
        try:
            with no_measuring():
                assert run_rank(config, claim.path, Mesh.alone()) == 0
        finally:
            claim.release()
        records.append(read_rows(claim.path))
    assert sorted(path.name for path in (tmp_path / "first" / "traces").iterdir()) == ["step_00000001", "step_00000002"]
    assert not (tmp_path / "again" / "traces").exists()
    for got, expected in zip(records[1], records[0], strict=True):
        assert "moe/routing" not in expected and got["moe/routing"] == "forced replay"
        for key in ("train/loss", "train/grad_norm", "moe/layer_01/load", "moe/layer_02/kept"):
            assert got[key] == expected[key], key


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("moe.num_experts=4", "sends block 1 to 2 of 8 experts, and the model to 2 of 4"),
        ("moe.router.top_k=1", "sends block 1 to 2 of 8 experts, and the model to 1 of 8"),
        ("model.layers.num_layers=4", "has MoE layers in the blocks [1, 2], and the model in [1, 2, 3]"),
        ("model.layers.num_layers=2", "has MoE layers in the blocks [1, 2], and the model in [1]"),
        ("moe.router.trace=nowhere", "nowhere holds no recorded step"),
        ("moe.num_experts=8", None),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_rank_starts(recorded, override: str, said: str | None):
    sizes = ["model.layers.num_layers=3", "model.layers.first_dense=1", "moe.num_experts=8"]
    overrides = ["experiment=null", "data=synthetic", "moe/router=replay", f"moe.router.trace={recorded[0]}", *sizes]
    composed = compose([*overrides, override])
    if said is None:
        validate(composed.config, composed.mapping, 1)
        return
    with pytest.raises(ConfigError) as caught:
        validate(composed.config, composed.mapping, 1)
    errors = {error.key: str(error) for error in getattr(caught.value, "errors", [caught.value])}
    assert said in errors["moe.router.trace"]


def test_a_replay_names_its_trace():
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=null", "moe/router=replay"])
    assert caught.value.key == "moe.router.trace"


@pytest.mark.parametrize(("value", "key"), [("{steps: [0]}", "steps"), ("{every: 0}", "every")])
def test_steps_that_are_none(value: str, key: str):
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=null", f"log.trace={value}"])
    assert caught.value.key == f"log.trace.{key}"
