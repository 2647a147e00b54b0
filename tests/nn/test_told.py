"""What a layer tells of itself: diagnostics, and all parameters as one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moedist.nn import MoELayer
from tests.nn.made import given_routing, layer_of, modules_of, vectors

SAMPLE = torch.tensor(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.4, 0.35, 0.05, 0.2],
        [0.1, 0.5, 0.1, 0.3],
    ],
    dtype=torch.float64,
)


@pytest.mark.requirement("R1-35", "R1-36", "C11", "C12")
def test_R1_35_diagnostics():
    """Exact names; total weight, mean weight when selected, population variance, most over least."""
    layer = given_routing(SAMPLE, 2)
    layer(torch.eye(4, dtype=torch.float64))
    found = layer.get_auxiliary_loss_diagnostics()
    # Choices: (0, 1), (0, 1), (0, 1), (1, 3); ties of the first row go to the lowest index.
    weight_0 = 0.7 / 0.8 + 0.6 / 0.8 + 0.4 / 0.75
    weight_3 = 0.3 / 0.8
    assert [found[f"expert_{e}_tokens"] for e in range(4)] == [3, 4, 0, 1]
    assert found["expert_0_prob_mass"] == pytest.approx(weight_0)
    assert found["expert_0_avg_weight"] == pytest.approx(weight_0 / 3)
    assert found["expert_3_prob_fraction"] == pytest.approx(weight_3 / 4)
    assert found["expert_2_avg_weight"] == 0 and found["max_min_ratio"] == float("inf")
    assert found["usage_variance"] == pytest.approx(2.5)
    assert found["usage_variance_fraction"] == pytest.approx(2.5 / 64)
    expected = 4 * (3 / 8 * 1.8 / 4 + 4 / 8 * 1.15 / 4 + 1 / 8 * 0.7 / 4)
    assert found["load_balance_loss"] == pytest.approx(expected) == layer.aux_loss.item()
    of_experts = {f"expert_{e}_{of}" for e in range(4) for of in ("tokens", "prob_mass", "prob_fraction", "avg_weight")}
    totals = {"load_balance_loss", "usage_variance", "usage_variance_fraction", "max_min_ratio"}
    assert set(found) == of_experts | totals | {"num_experts", "batch_size", "top_k"}


def test_R1_37_diagnostics_as_text():
    layer = given_routing(SAMPLE, 2)
    assert layer.get_auxiliary_loss_diagnostics() == {"status": "no forward pass since the last reset"}
    layer(torch.eye(4, dtype=torch.float64))
    text = layer.get_auxiliary_loss_diagnostics().as_strings()
    assert (text["num_experts"], text["batch_size"], text["top_k"]) == ("4", "4", "2")
    assert (text["expert_0_tokens"], text["expert_0_prob_mass"]) == ("3", "2.1583")
    assert (text["expert_0_avg_weight"], text["usage_variance"]) == ("0.7194", "2.500000")
    assert (text["max_min_ratio"], text["load_balance_loss"]) == ("inf", "1.337500")
    layer.use_aux_loss = False
    assert "load_balance_loss" not in layer.get_auxiliary_loss_diagnostics()


def test_R1_39_all_diagnostics():
    layer = layer_of()
    found = layer.get_diagnostics()
    assert found == {
        "layer.type": "MoELayer",
        "layer.input_shape": "[..., 6]",
        "layer.output_shape": "[..., 5]",
        "layer.parameter_count": layer.num_parameters(),
        "layer.supports_training": "True",
        "layer.activation": "none",
        "status": "no forward pass since the last reset",
    }
    layer(vectors(3))
    assert layer.get_diagnostics()["num_experts"] == 4 and "status" not in layer.get_diagnostics()


@pytest.mark.requirement("R1-40", "R1-41")
def test_R1_41_flat_parameters():
    """Router, expert 0, expert 1, ...; back bit by bit; a wrong length changes nothing."""
    layer = layer_of(use_aux_loss=True)
    router, experts = modules_of(layer)
    by_hand = [p.detach().reshape(-1) for module in (router, *experts) for p in module.parameters()]
    flat = layer.get_flat_parameters()
    assert torch.equal(flat, torch.cat(by_hand)) and flat.numel() == layer.num_parameters()
    layer.set_flat_parameters(torch.zeros_like(flat))
    assert all(not parameter.any() for parameter in layer.parameters())
    layer.set_flat_parameters(flat)
    assert torch.equal(layer.get_flat_parameters(), flat)
    for wrong in (flat[:-1], torch.cat([flat, flat[:1]]), flat[None]):
        with pytest.raises(ValueError, match=f"expected a vector of {flat.numel()} numbers, got one of shape"):
            layer.set_flat_parameters(wrong + 1)
        assert torch.equal(layer.get_flat_parameters(), flat)
    half = layer_of(dtype=torch.bfloat16)
    assert half.get_flat_parameters().dtype == torch.bfloat16


def test_a_layer_without_parameters_has_an_empty_vector():
    layer = MoELayer([nn.Identity(), nn.Tanh()], nn.Hardtanh(), 2, top_k=1)
    assert layer.num_parameters() == 0 == layer.get_flat_parameters().numel()
    layer.set_flat_parameters(torch.zeros(0))
