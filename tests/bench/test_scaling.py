from __future__ import annotations

import json

import pytest
import torch

from moedist.bench import scaling
from moedist.bench.scaling import measure_scaling
from moedist.bench.shapes import LayerShape
from moedist.mesh import Mesh

TINY = LayerShape("tiny", tokens=32, dim=16, hidden_dim=8, num_experts=8, top_k=4, dtype=torch.float32)


def test_growth_is_against_the_floor(monkeypatch):
    monkeypatch.setattr(scaling, "EXPERTS", (2, 4, 8))
    monkeypatch.setattr("moedist.bench.ceilings.MEASURE_S", 0.01)
    (case,) = measure_scaling([TINY], 1.0, 4, Mesh.alone())
    assert [size["num_experts"] for size in case["sizes"]] == [4, 8], "two experts are too few for four per token"
    for size in case["sizes"]:
        assert size["over_f2"] == pytest.approx(size["ms"] / size["f2_ms"]) and size["optimizer_ms"] > 0
    assert case["growth"] > 0 and case["routing"] == "forced balanced"
    json.dumps(case)
