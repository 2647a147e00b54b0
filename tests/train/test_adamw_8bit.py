"""AdamW with moments of 8 bits: near AdamW, before and after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moedist.config import ConfigError
from moedist.engine.contract import TrainingStep
from moedist.engine.native import NativeConfig, in_full
from moedist.mesh import Mesh
from moedist.parallel import spread
from moedist.train.checkpoint.manifest import folder_name
from moedist.train.optimizer.adamw import AdamWConfig
from moedist.train.optimizer.adamw_8bit import AdamW8bitConfig
from tests.train.test_resume_layouts import BIASED, SAVED, STEPS, run, saved
from tests.train.tiny import changed, rows_of

RATES = {"router_lr": 1e-2, "experts_lr": 1e-2, "other_lr": 1e-2, "weight_decay": 0.1}


def test_without_torchao_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs torchao, which is not installed. Install it"):
        AdamW8bitConfig().of_groups([])


def engine_of(config: AdamWConfig):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 128)
    gradients = spread(model, Mesh.alone())
    step = TrainingStep(1, 1, "fp32", None)
    return NativeConfig().build(model, Mesh.alone(), config.build(model, gradients), gradients, step)


@pytest.mark.slow
def test_near_adamw_and_nearly_itself_after_a_stop():
    pytest.importorskip("torchao")
    narrow, wide = engine_of(AdamW8bitConfig(**RATES)), engine_of(AdamWConfig(**RATES))
    start = narrow.model.weight.detach().clone()
    kept = {}
    for step in range(6):
        for engine in (narrow, wide):
            engine.set_learning_rate(1.0 if step < 3 else 0.5)  # a rate that changes is seen
            torch.manual_seed(step)
            for parameter in engine.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            engine.optimizer.step()
        if step == 3:
            kept = {"model": {k: v.clone() for k, v in narrow.state()["model"].items()}, "optimizer": {}}
            for name, moments in narrow.state()["optimizer"].items():
                kept["optimizer"][name] = {key: value.clone() for key, value in moments.items()}
    moved = (wide.model.weight - start).norm()
    assert (narrow.model.weight - wide.model.weight).norm() < 0.05 * moved
    assert narrow.state()["optimizer"]["weight"]["exp_avg"].dtype == torch.float32

    again = engine_of(AdamW8bitConfig(**RATES))
    state = again.state()
    assert not any(value.any() for moments in state["optimizer"].values() for value in moments.values())
    for name, value in kept["model"].items():
        state["model"][name].copy_(value)
    for name, moments in kept["optimizer"].items():
        for key, value in moments.items():
            state["optimizer"][name][key].copy_(value)
    again.restore(state, 4)
    again.set_learning_rate(0.5)
    for step in (4, 5):
        torch.manual_seed(step)
        for parameter in again.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        again.optimizer.step()
    apart = (again.model.weight - narrow.model.weight).norm()
    assert 0 < apart < 0.01 * moved, "a resume rounds moments once more, and no more than that"
    moment = narrow.optimizer.state[narrow.model.weight]["exp_avg"]
    assert type(moment) is not torch.Tensor and torch.equal(in_full(moment), moment.dequantize(torch.float32))


@pytest.mark.slow
def test_a_run_goes_on_at_other_layouts_and_with_adamw(ranks, tmp_path: Path):
    """From pieces to whole weights and to another rule: names and shapes of moments are the same."""
    pytest.importorskip("torchao")
    narrow = changed(BIASED, train={"optimizer": AdamW8bitConfig(**RATES)}, model={"dim": 64})
    wide = changed(narrow, train={"optimizer": AdamWConfig(**RATES)})
    whole = run(ranks, (2, 2, 2), narrow, tmp_path / "whole")
    expected = rows_of(whole)
    source = str(whole / "checkpoints" / folder_name(SAVED))
    for number, (layout, config) in enumerate([((2, 2, 2), narrow), ((2, 2, None), narrow), ((1, 1, None), wide)]):
        rows = rows_of(run(ranks, layout, config, tmp_path / str(number), source))
        assert len(rows) == STEPS - SAVED
        for step, row in rows.items():
            assert row["train/loss"] == pytest.approx(expected[step]["train/loss"], rel=0, abs=0.06), (layout, step)
    moment = saved(whole, STEPS).read("optimizer.blocks.1.ffn.moe.bank.experts.up.exp_avg")
    assert moment.dtype == torch.float32 and len(moment.flatten(1).unique(dim=0)) == len(moment)
