"""Numbers of usage against tables that were worked out elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moedist.moe.context import TokenContext
from moedist.nn.usage import Usage, usage_diagnostics
from tests.moe.by_hand import route_logits

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
