"""Diagnostics of usage, by hand and against tables that were worked out elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moedist.moe.context import TokenContext
from moedist.nn.usage import Usage, usage_diagnostics
from tests.moe.by_hand import route_logits
from tests.nn.made import given_routing, layer_of, vectors

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "routing.json").read_text())


@pytest.mark.requirement("R1-36", "C11", "C12", "C13")
def test_G9_diagnostics_of_two_examples():
    """Six tokens with two choices each; and the variances and ratio that counts of 245, 198, 223 and 234 have."""
    ctx = TokenContext.of_rows(1, 6)
    routing = route_logits(torch.tensor(GOLDEN["G4"]["logits"], dtype=torch.float64), ctx, top_k=2)
    found, case = usage_diagnostics(Usage.of(routing, ctx), with_loss=True), GOLDEN["G9_from_G4_top2"]
    names = {"tokens": "tokens", "prob_mass": "prob_mass_total", "prob_fraction": "prob_mass_fraction"}
    for key, column in (names | {"avg_weight": "avg_weight"}).items():
        assert [found[f"expert_{e}_{key}"] for e in range(4)] == pytest.approx(case[column], abs=1e-6), key
    assert found["usage_variance"] == pytest.approx(case["usage_variance_counts"])
    assert found["usage_variance_fraction"] == pytest.approx(case["usage_variance_fractions"])
    assert found["max_min_ratio"] == case["max_min_ratio"]
    assert found["load_balance_loss"] == pytest.approx(GOLDEN["G4"]["loss_top2_switch"], abs=1e-9)

    case = GOLDEN["G9_seed_example"]
    tokens_E, one = torch.tensor(case["tokens"], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    found = usage_diagnostics(Usage(tokens_E, one, one, one, one.sum(), tokens_E.sum()), with_loss=False)
    assert found["usage_variance"] == pytest.approx(case["pop_var_counts"])
    assert found["usage_variance_fraction"] == pytest.approx(case["pop_var_fractions"])
    assert found["max_min_ratio"] == pytest.approx(case["max_min_ratio"])
    assert "load_balance_loss" not in found


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
