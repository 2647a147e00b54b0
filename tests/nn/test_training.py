"""Loss, optimizer groups and the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import MixtureConfig
from moedist.nn import MoELayer, MoELayerConfig, MoELoss, MoEOptimizerConfig, parameter_groups, training_step


def layer_of(**changes) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer.from_config(MoELayerConfig(in_features=8, top_k=2, **changes))


@pytest.mark.requirement("R1-14", "R2-48", "C15", "D10")
def test_R2_48_weight_acts_once():
    """The layer's loss is unscaled: 1 for uniform routing, not 0.01; the sum holds 0.01 of it, not 0.0001."""
    layer, x = layer_of(), torch.randn(6, 8)
    out = layer(x)
    task = F.mse_loss(out, x)
    assert layer.aux_loss.item() == pytest.approx(1, abs=0.5)
    cases = {
        MoELoss(F.mse_loss): 0.01 * layer.aux_loss,
        MoELoss(F.mse_loss, aux_weight=0.5): 0.5 * layer.aux_loss,
        MoELoss(F.mse_loss, z_weight=0.1): 0.01 * layer.aux_loss + 0.1 * layer.z_loss,
    }
    for loss, added in cases.items():
        torch.testing.assert_close(loss(out, x, layer), task + added)
    layer.aux_loss_weight = 0.2
    torch.testing.assert_close(MoELoss(F.mse_loss)(out, x, layer, layer), task + 0.4 * layer.aux_loss)
    layer.use_aux_loss = False
    assert MoELoss(F.mse_loss)(out, x, layer) == task
    with pytest.raises(ValueError, match="aux_weight = -1"):
        MoELoss(F.mse_loss, aux_weight=-1)


@pytest.mark.requirement("R2-50")
def test_R2_50_groups():
    """Every parameter in exactly one group, with its rate; biases do not decay."""
    head = nn.Linear(8, 2)
    model = nn.Sequential(nn.Linear(8, 8), layer_of(), head)
    config = MoEOptimizerConfig()
    groups = parameter_groups(model, config, output=head)
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = [parameter for group in groups for parameter in group["params"]]
    assert len(placed) == len(set(placed)) == len(names)
    rates = {"router": 1e-3, "experts": 5e-4, "output": 5e-4, "other": 5e-4}
    prefixes = {"router": "1.moe.router.", "experts": "1.moe.bank.experts.", "output": "2.", "other": "0."}
    for group in groups:
        assert group["lr"] == rates[group["name"]]
        for parameter in group["params"]:
            assert names[parameter].startswith(prefixes[group["name"]])
            assert group["weight_decay"] == (0 if names[parameter].endswith("bias") else 1e-5)
    assert (config.max_norm, type(config.build(model))) == (1.0, torch.optim.AdamW)
    assert {group["name"] for group in parameter_groups(model, config)} == {"router", "experts", "other"}
    for wrong in ({"router_lr": -1}, {"max_norm": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MoEOptimizerConfig(**wrong)


def test_groups_of_a_mixture_of_attention_experts():
    """Its router, its experts, and the projection behind them."""
    mixture = MixtureConfig(num_heads=2, experts=(StandardConfig(), LinearConfig())).build_mixture(8)
    names = {parameter: name for name, parameter in mixture.named_parameters()}
    placed = {
        names[parameter]: group["name"]
        for group in parameter_groups(mixture, MoEOptimizerConfig())
        for parameter in group["params"]
    }
    prefixes = {"router.": "router", "bank.": "experts", "output_": "output"}
    assert placed == {name: role for name in names.values() for p, role in prefixes.items() if name.startswith(p)}


@pytest.mark.requirement("R2-49")
@pytest.mark.parametrize("pool", ["none", "first", "mean"])
def test_R2_49_training_step(pool: str):
    model = nn.Sequential(layer_of(), nn.Linear(8, 3)).eval()
    optimizer, loss = MoEOptimizerConfig(router_lr=1e-2, experts_lr=1e-2).build(model), MoELoss(F.mse_loss)
    x = torch.randn(5, 4, 8)
    target = torch.randn(5, 4, 3)
    target = {"none": target, "first": target[:, 0], "mean": target.mean(1)}[pool]
    losses = [training_step(model, x, target, loss, optimizer, pool=pool) for _ in range(30)]
    assert model.training and losses[-1] < 0.9 * losses[0]
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm <= 1.0001
