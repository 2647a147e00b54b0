"""The native engine on one process; over ranks see tests/parallel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moedist.engine.contract import TrainingStep
from moedist.engine.native import NativeConfig, NativeEngine
from moedist.mesh import Mesh
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig
from moedist.parallel import spread
from moedist.train.optimizer.adamw import AdamWConfig


def engine_of(clip_norm: float | None = None, **rates: float) -> tuple[nn.Module, NativeEngine]:
    model = MoEConfig(num_experts=4).build(8)
    table = spread(model, Mesh.alone())
    optimizer = AdamWConfig(**rates).build(model, table)
    return model, NativeConfig().build(model, Mesh.alone(), optimizer, table, step_of(clip_norm))


def step_of(clip_norm: float | None) -> TrainingStep:
    return TrainingStep(micro_batch=2, accumulation=1, precision="fp32", clip_norm=clip_norm)


def run_step(model: nn.Module, engine: NativeEngine, step: int = 0, factor: float = 1.0) -> float:
    x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
    output = model(x_TD, TokenContext.of_rows(2, 6, step=step))
    engine.backward(factor * output.out_TD.square().sum() + output.report.losses["switch"], last=True)
    return engine.step()


def everything(model: nn.Module, engine: NativeEngine) -> list[torch.Tensor]:
    state = engine.state()
    moments = [value for part in state["optimizer"].values() for value in part.values()]
    return [value.clone() for value in (*state["model"].values(), *moments)]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    model, engine = engine_of(clip_norm=1.0)
    run_step(model, engine)
    before = everything(model, engine)
    norm = run_step(model, engine, step=1, factor=poison)
    assert not torch.tensor(norm).isfinite()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(model, engine), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    run_step(model, engine, step=2)
    assert all(value.isfinite().all() for value in everything(model, engine))


def test_clip_scales_to_the_norm_and_leaves_smaller_gradients():
    for clip_norm, acts in ((0.01, True), (1e6, False), (None, False)):
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer, mesh = torch.optim.SGD(model.parameters(), lr=1.0), Mesh.alone()
        engine = NativeConfig().build(model, mesh, optimizer, spread(model, mesh), step_of(clip_norm))
        engine.optimizer.param_groups[0]["name"] = "other"
        engine.backward(model(torch.tensor([[3.0, 4.0]])).sum(), last=True)
        assert engine.step() == pytest.approx(5.0), "the norm before the clip"
        expected = [-0.006, -0.008] if acts else [-3.0, -4.0]
        assert model.weight[0].tolist() == pytest.approx(expected)


def test_gradients_add_up_until_the_step():
    model, engine = engine_of()
    other, expected = engine_of()
    x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    for place, part_TD in enumerate(x_TD.chunk(2), start=1):
        engine.backward(model.bank.experts.up.sum() * part_TD.sum(), last=place == 2)
    expected.backward(other.bank.experts.up.sum() * x_TD.sum(), last=True)
    torch.testing.assert_close(model.bank.experts.up.grad, other.bank.experts.up.grad)


def test_state_before_the_first_step_moves_nothing():
    """What a load needs to fill: every moment, at zero, and a run that goes on as if nobody had asked."""
    model, engine = engine_of(weight_decay=0.1)
    start, rates = copy.deepcopy(model.state_dict()), engine.learning_rates()
    state = engine.state()
    assert set(state["optimizer"]) == {name for name, _ in model.named_parameters()}
    assert all(set(part) == {"step", "exp_avg", "exp_avg_sq"} for part in state["optimizer"].values())
    assert all((value == 0).all() for part in state["optimizer"].values() for value in part.values())
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert engine.learning_rates() == rates and all(p.grad is None for p in model.parameters())
    untouched_model, untouched = engine_of(weight_decay=0.1)
    for step in range(2):
        run_step(model, engine, step)
        run_step(untouched_model, untouched, step)
    pairs = zip(everything(model, engine), everything(untouched_model, untouched), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_state_is_live():
    model, engine = engine_of()
    run_step(model, engine)
    state = engine.state()
    with torch.no_grad():
        state["model"]["router.weight"].fill_(7.0)
        state["optimizer"]["router.weight"]["exp_avg"].fill_(5.0)
    assert (model.router.weight == 7).all()
    assert (engine.optimizer.state[model.router.weight]["exp_avg"] == 5).all()


def test_learning_rates_by_group():
    _, engine = engine_of(router_lr=1.0, experts_lr=0.1, other_lr=0.01)
    assert engine.learning_rates() == {"router": 1.0, "experts": 0.1}
    for factor in (0.5, 0.25, 1.0):
        engine.set_learning_rate(factor)
        assert engine.learning_rates() == {"router": factor, "experts": pytest.approx(0.1 * factor)}
