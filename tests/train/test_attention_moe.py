"""Models whose attention is a mixture of experts, through the trainer: parity, resume at another layout, metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigErrors
from moedist.launch.compose import compose
from moedist.launch.validate import accepts, validate
from moedist.log.metrics import ATTENTION
from moedist.log.run_files import ATTENTION_EXPERTS, ExpertsFile
from moedist.log.series import Series
from moedist.log.sink.console import log_line
from moedist.mesh import Mesh
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.moe import MixedAttentionConfig
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.sinkhorn import SinkhornConfig
from moedist.report.data import page_data
from moedist.report.run import read_run
from moedist.train.dry_run import dry_run
from tests.ranks import Here
from tests.train.measure import run_steps
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, make_trainer, no_measuring

KINDS = (StandardConfig(rope_theta=1e4), HyperbolicConfig(learnable=True), LinearConfig(), StandardConfig(qk_norm=True))


def mixed(bank: str = "gathered", **train: Any) -> Any:
    """The tiny run with routed attention in every block; dropping, noise and dropout are on."""
    attention = MixedAttentionConfig(
        num_heads=2,
        experts=KINDS,
        router=MLPConfig(hidden_dim=6, noise_std=0.3),
        capacity=CapacityConfig(factor=1.0),
        balance={
            "switch": SwitchConfig(0.3, "micro_batch"),
            "z_loss": ZLossConfig(0.1),
            "bias": BiasConfig(rate=0.01),
        },
        dropout=0.2,
        bank=bank,
    )
    return changed(CONFIG, model={"attention": attention}, train=train)


def on_ranks(here: Here, cases: list[tuple[Any, int, int | None]], steps: int) -> list[Any]:
    found = []
    for config, ep, fsdp in cases:
        trainer = make_trainer(config, config.data.open(), here.mesh_of(ep, fsdp))
        sharded = [mixture.bank.sharded for mixture in trainer.measures.mixtures]
        found.append((run_steps(trainer, steps), sharded))
    return found


def check_parity(ranks: Any, world: int, eps: tuple[int, ...], accumulations: tuple[int, ...] = (1, 2)) -> None:
    for accumulation in accumulations:
        tokens = world * accumulation * ROWS * LENGTH
        cases = [
            (mixed(bank, global_batch_tokens=tokens, activation_checkpointing=again), ep, None)
            for ep in eps
            for bank in ("replicated", "gathered")
            for again in ("none", "full")
        ]
        cases += [(mixed("auto", global_batch_tokens=tokens), ep, world) for ep in eps]
        reference = mixed(global_batch_tokens=tokens)
        expected = run_steps(make_trainer(reference, reference.data.open(), Mesh.alone()), 2)
        held: list[set[str]] = [set() for _ in cases]
        for results in ranks(world).run(on_ranks, cases, 2):
            for place, ((got, sharded), (config, ep, _)) in enumerate(zip(results, cases, strict=True)):
                assert sharded == [config.model.attention.bank == "gathered" and ep > 1] * 3
                held[place] |= got.grads.keys()
                for values, others in ((got.grads, expected.grads), (got.last, expected.last)):
                    for name, value in values.items():
                        assert (value - others[name]).abs().max() <= 1e-11, (name, config.model.attention.bank, ep)
                assert got.losses == pytest.approx(expected.losses, abs=1e-12)
                assert got.norms == pytest.approx(expected.norms, abs=1e-11)
        assert all(names == expected.grads.keys() for names in held)


@pytest.mark.slow
def test_ranks_train_as_one_device(ranks: Any):
    check_parity(ranks, 2, (2,))


@pytest.mark.slow
def test_four_ranks_train_as_one_device(ranks: Any):
    check_parity(ranks, 4, (1, 2, 4))


def whole_state(trainer: Any) -> dict[str, Tensor]:
    state = trainer.state()
    return {name: value.detach().clone() for name, value in state["model"].items() if isinstance(value, Tensor)}


LOG = SimpleNamespace(saved=lambda *_: None, say=lambda *_: None)


def save_in_the_middle(here: Here, config: Any, folder: Path) -> dict[str, Tensor]:
    """Two steps, a checkpoint, two steps; this rank's parameters after them."""
    trainer = make_trainer(config, config.data.open(), here.mesh_of(2), folder)
    run_steps(trainer, 2)
    trainer.save(LOG, must=True)
    run_steps(trainer, 2)
    return {name: value for name, value in whole_state(trainer).items() if "attention" in name}


def load_and_go_on(here: Here, config: Any, folder: Path) -> dict[str, Tensor]:
    """From the checkpoint of step 2, two steps."""
    trainer = make_trainer(config, config.data.open(), here.mesh_of(2), folder)
    trainer.load(folder / "step_00000002")
    run_steps(trainer, 2)
    return {name: value for name, value in whole_state(trainer).items() if "attention" in name}


def test_unlike_experts_are_resumed_by_global_id_at_another_layout(ranks: Any, tmp_path: Path):
    config = mixed(global_batch_tokens=2 * ROWS * LENGTH)
    parts = ranks(2).run(save_in_the_middle, config, tmp_path)
    assert parts[0].keys() != parts[1].keys()
    trainer = make_trainer(config, config.data.open(), Mesh.alone(), tmp_path)
    trainer.load(tmp_path / "step_00000002")
    assert trainer.progress.step == 2
    run_steps(trainer, 2)
    whole = whole_state(trainer)
    assert {name for name in whole if "attention" in name} == parts[0].keys() | parts[1].keys()
    again = ranks(2).run(load_and_go_on, config, tmp_path)
    assert [part.keys() for part in again] == [part.keys() for part in parts]
    for part in (*parts, *again):
        for name, value in part.items():
            torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-11, msg=name)


def test_records_of_layers_with_unlike_numbers_of_experts(tmp_path: Path):
    config = mixed("replicated")
    with no_measuring():
        trainer = make_trainer(config, config.data.open(), Mesh.alone())
        records: list[dict[str, Any]] = []
        trainer.measures.measure_peak()
        loader = trainer.loader()
        for _ in range(2):
            assert trainer.step(loader)
            trainer.record(SimpleNamespace(write=records.append), evaluated=False)
    record = records[-1]
    assert record["attention/layers/block"] == [0, 1, 2] and record["moe/layers/block"] == [1, 2]
    assert record["attention/experts/load"].shape == (3, 4) and record["moe/experts/load"].shape == (2, 8)
    assert record["attention/experts/load"].sum() == 3 * 2 * ROWS * LENGTH
    assert 0 < record["attention/drop_rate"] < 1 and 0 < record["attention/router_entropy"] <= 1
    assert record["attention/bias_drift"] > 0 and record["attention/balance_loss"] > 0
    assert "attn" in log_line(record, 20, None) and len(log_line(record, 20, 1.0)) <= 100
    row = Series(1000).row(record)
    assert row.scalars["attention/layer_02/max_vio"] == record["attention/layers/max_vio"][2]
    assert row.histograms["attention/layer_00/load"].shape == (4,) and row.histograms["moe/layer_01/load"].shape == (8,)
    assert {"attention/layers/max_vio"} <= Series(50).row(record).tables.keys()

    (tmp_path / "config.yaml").write_text("run: {name: mixed}\n")
    sink = config.log.sinks["jsonl"].open(
        SimpleNamespace(directory=tmp_path, num_steps=2),
        lambda *_: None,  # type: ignore[arg-type]
    )
    for each in records:
        sink.write(each)
    sink.close("done")
    assert ExpertsFile(tmp_path, ATTENTION_EXPERTS).blocks == (0, 1, 2)
    assert ExpertsFile(tmp_path).at(2)["load"].shape == (2, 8)
    data = page_data([read_run(tmp_path)])["runs"][0]
    assert f"{ATTENTION}/max_vio" in data["scalars"] and data["blocks"] == [1, 2]
    assert data["attention"]["experts"]["num_experts"] == 4 and "max_vio" in data["attention"]["columns"]


@pytest.mark.requirement("R2-61")
def test_a_router_that_looks_ahead_is_refused():
    with pytest.raises(Exception, match="attention.router.kind = 'sinkhorn' lets later tokens"):
        attention = dataclasses.replace(mixed().model.attention, router=SinkhornConfig(), balance={})
        changed(CONFIG, model={"attention": attention})


def test_the_command_composes_validates_and_plans(tmp_path: Path):
    experts = "model.attention.experts=[{kind: standard, rope_theta: 10000.0}, {kind: hyperbolic}]"
    composed = compose(["model/attention=moe", experts, f"run.dir={tmp_path / 'run'}", "mesh.ep=2", "launch.nproc=2"])
    validate(composed.config, composed.mapping, 2)
    assert [expert.kind for expert in composed.config.model.attention.experts] == ["standard", "hyperbolic"]
    plan = dry_run(composed.config, 257, 2)
    experts_of = [
        {name for name in rank.shapes if "bank.experts" in name and "attention" in name} for rank in plan.ranks
    ]
    assert all(".experts.0." in name for name in experts_of[0]) and all(".experts.1." in n for n in experts_of[1])


@pytest.mark.parametrize("override", ["mesh.fsdp=2", "engine=deepspeed", "+experiment=null"])
def test_gathered_is_refused_where_all_ranks_must_be_alike(override: str):
    overrides = ["model/attention=moe", "model.attention.bank=gathered", "mesh.ep=2", "launch.nproc=2"]
    composed = compose([*overrides, *([override] if override != "+experiment=null" else [])])
    assert accepts(composed.config, 2) == (override == "+experiment=null")
    assert accepts(compose(["model/attention=moe", "mesh.ep=2", "launch.nproc=2"]).config, 2)
    with pytest.raises(ConfigErrors, match="cannot cut 4 attention experts into 8 equal parts"):
        config = compose(["model/attention=moe", "model.attention.bank=gathered", "mesh.ep=8", "launch.nproc=8"])
        validate(config.config, config.mapping, 8)
