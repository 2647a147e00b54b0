"""Muon: matrices made orthogonal, experts each for itself, at every layout; AdamW for the rest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moedist.config import ConfigError
from moedist.engine.deepspeed import DeepSpeedConfig
from moedist.engine.native import NativeConfig
from moedist.launch.validate import accepts
from moedist.mesh import Mesh, MeshConfig
from moedist.moe.init import fill_normal, named_generator
from moedist.train.build import build_engine, build_model
from moedist.train.config import RunConfig
from moedist.train.optimizer.adamw import AdamWConfig
from moedist.train.optimizer.muon import Muon, MuonConfig, newton_schulz
from tests.ranks import Here
from tests.train.test_resume_layouts import BIASED, goes_on, run
from tests.train.tiny import CONFIG, changed

RATES = {"router_lr": 1e-2, "experts_lr": 2e-2, "other_lr": 3e-2, "weight_decay": 0.1}
MUON = changed(CONFIG, train={"optimizer": MuonConfig(**RATES)})
LAYOUTS = [(4, 2, None), (4, 2, 4)]
MORE_LAYOUTS = [(2, 2, None), (2, 2, 2), (4, 1, None), (4, 4, None), (4, 1, 2)]


def test_singular_values_end_near_one():
    """Between 0.68 and 1.14, whatever they were; the published coefficients promise no more."""
    torch.manual_seed(0)
    stack = torch.randn(3, 20, 12, dtype=torch.float64)
    for matrices in (stack, stack.mT, 1e-3 * stack, stack[0]):
        made = newton_schulz(matrices)
        values = torch.linalg.svdvals(made)
        assert made.shape == matrices.shape and values.min() > 0.68 and values.max() < 1.14
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        aligned = (left.mT @ made @ right.mT).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(aligned.sort().values, values.sort().values)  # the same axes: only lengths change
    assert not newton_schulz(torch.zeros(2, 4, 4)).any()


def test_it_is_torchs_muon_on_matrices():
    """torch iterates in bf16, so within its rounding."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    muon = Muon([{"params": [ours], "lr": 0.02, "weight_decay": 0.1}], None, 0.95)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(24, 16)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    moved = (theirs - 1).norm()
    assert moved > 0.2 and (ours - theirs).norm() < 0.02 * moved


def test_experts_are_matrices_of_their_own():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 6, 10, dtype=torch.float64))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn_like(stack)
    stack.grad[1] = 0  # an expert without tokens decays and does not move
    for parameter, grad in zip(alone, stack.grad, strict=True):
        parameter.grad = grad.clone()
    idle = 0.95 * alone[1].detach()
    for parameters in ([stack], alone):
        Muon([{"params": parameters, "lr": 0.5, "weight_decay": 0.1}], None, 0.9).step()
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in alone]), atol=1e-14, rtol=0)
    torch.testing.assert_close(alone[1].detach(), idle)


def moments_of(config: RunConfig) -> dict[str, set[str]]:
    """What the optimizer keeps, by parameter."""
    spread = build_model(config, 37, Mesh.alone())
    state = build_engine(config, spread, Mesh.alone()).state()["optimizer"]
    assert state.keys() == dict(spread.model.named_parameters()).keys()
    return {name: set(moments) for name, moments in state.items()}


def test_matrices_have_a_momentum_and_all_else_adamws_moments():
    for name, moments in moments_of(MUON).items():
        matrix = name.startswith("blocks.") and not any(part in name for part in ("router", "norm"))
        assert moments == ({"momentum"} if matrix else {"step", "exp_avg", "exp_avg_sq"}), name
    named = changed(CONFIG, train={"optimizer": MuonConfig(elementwise=("*.query.weight",))})
    found = moments_of(named)
    assert found["head.weight"] == {"momentum"} and "exp_avg" in found["blocks.0.attention.query.weight"]


def stepped(here: Here | None, config: RunConfig) -> dict[str, Tensor]:
    """Every whole parameter after three updates by gradients that are drawn by name."""
    mesh = Mesh.alone() if here is None else here.mesh_of(config.mesh.ep, config.mesh.fsdp)
    spread = build_model(config, 37, mesh)
    engine = build_engine(config, spread, mesh)
    for step in range(3):
        for name, parameter in engine.model.named_parameters():
            parameter.grad = torch.zeros_like(parameter)
            fill_normal(parameter.grad, named_generator(step, name), 1.0)
        engine.optimizer.step()
    parameters = dict(engine.model.named_parameters())
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in parameters.items()}


@pytest.mark.parametrize("rule", [AdamWConfig(**RATES), MuonConfig(**RATES)], ids=["adamw", "muon"])
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.slow)])
def test_a_layout_changes_no_update(ranks, rule: AdamWConfig, layouts: list[tuple[int, int, int | None]]):
    config = changed(CONFIG, train={"optimizer": rule})
    expected = stepped(None, config)
    start = dict(build_model(config, 37, Mesh.alone()).model.named_parameters())
    assert all((expected[name] - start[name]).abs().max() > 1e-2 for name in start)
    for world, ep, fsdp in layouts:
        cut = dataclasses.replace(config, mesh=MeshConfig(ep=ep, fsdp=fsdp))
        for found in ranks(world).run(stepped, cut):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-11, rtol=0, msg=f"{name} {world, ep, fsdp}")


@pytest.mark.slow
def test_a_run_goes_on_at_other_layouts(ranks, tmp_path: Path):
    config = changed(BIASED, train={"optimizer": MuonConfig(**RATES)})
    whole = run(ranks, (4, 2, 4), config, tmp_path / "whole")
    goes_on(ranks, whole, [(4, 2, 4), (4, 4, None), (2, 2, 2), (1, 1, None)], config, tmp_path)


@pytest.mark.parametrize("engine", [DeepSpeedConfig(), NativeConfig(offload=True)], ids=["deepspeed", "offload"])
def test_where_weights_are_cut_anywhere_it_is_refused(engine):
    mesh = MeshConfig(fsdp=1) if isinstance(engine, NativeConfig) else MeshConfig()
    whole = changed(CONFIG, train={"precision": "fp32"})
    config = dataclasses.replace(whole, engine=engine, mesh=mesh)
    assert accepts(config, 1)
    assert not accepts(changed(config, train={"optimizer": MuonConfig()}), 1)


def test_errors():
    with pytest.raises(ConfigError, match="momentum = 1.0 is no decay"):
        MuonConfig(momentum=1.0)
    with pytest.raises(ConfigError, match="is negative"):
        MuonConfig(experts_lr=-1.0)
