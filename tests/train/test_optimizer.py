"""AdamW's groups: each trainable parameter in one, with its role's rate and its decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moedist.config import ConfigError
from moedist.mesh import Mesh
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.layer import MoEConfig
from moedist.parallel import spread
from moedist.train.optimizer.adamw import AdamWConfig


def model_and_optimizer(**settings):
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 8),
            "norm": nn.LayerNorm(8),
            "moe": MoEConfig(num_experts=4, experts=GroupedConfig(hidden_dim=8, bias=True), shared_hidden_dim=4).build(
                8
            ),
            "frozen": nn.Linear(8, 8),
        }
    )
    model["frozen"].requires_grad_(False)
    return model, AdamWConfig(**settings).build(model, spread(model, Mesh.alone()))


def test_every_trainable_parameter_is_in_exactly_one_group():
    model, optimizer = model_and_optimizer()
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_rates_and_decay():
    model, optimizer = model_and_optimizer(
        router_lr=3.0, experts_lr=2.0, other_lr=1.0, weight_decay=0.5, beta1=0.8, beta2=0.7, eps=1e-4
    )
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of[id(parameter)]
        role = "router" if "router" in name else "experts" if "bank.experts" in name else "other"
        assert group["name"] == role, name
        assert group["lr"] == {"router": 3.0, "experts": 2.0, "other": 1.0}[role]
        decays = not (name.startswith("norm") or name.endswith("bias"))
        assert group["weight_decay"] == (0.5 if decays else 0.0), name
        assert group["betas"] == (0.8, 0.7) and group["eps"] == 1e-4


def test_groups_are_the_same_whatever_the_order_of_the_parameters():
    """A rank that builds in another order must not resume into another group."""
    _, first = model_and_optimizer()
    names = [(group["name"], group["weight_decay"] > 0) for group in first.param_groups]
    assert names == sorted(names) and len(set(names)) == len(names)


@pytest.mark.pitfall("4")
def test_idle_parameters_move_and_decay_like_the_others():
    """Pitfall 4: a zero gradient is a step of decay; None would be no step."""
    model, optimizer = model_and_optimizer(weight_decay=0.1, experts_lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before = model["moe"].bank.experts.up.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model["moe"].bank.experts.up, before * (1 - 0.5 * 0.1))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("router_lr", -1.0, "is negative. Set it to 0 or more"),
        ("experts_lr", -1.0, "is negative"),
        ("other_lr", -0.1, "is negative"),
        ("weight_decay", -0.1, "is negative"),
        ("eps", -1e-9, "is negative"),
        ("beta1", 1.0, "is no decay rate. Set it to 0 or more, and below 1"),
        ("beta2", -0.5, "is no decay rate"),
    ],
)
def test_errors(key, value, said):
    with pytest.raises(ConfigError, match=said) as caught:
        AdamWConfig(**{key: value})
    assert caught.value.key == key and caught.value.value == value
