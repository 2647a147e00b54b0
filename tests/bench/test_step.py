from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moedist.bench.step import Point, compare_with_dense, dense_twin, loss_at, losses_at_equal, measure_step
from moedist.config import ConfigError
from tests.train.tiny import CONFIG, no_measuring

CPU = torch.device("cpu")


def test_phases_make_up_the_step_and_a_trace_is_written(tmp_path):
    trace = tmp_path / "trace.json"
    with no_measuring():
        found = measure_step(CONFIG, tmp_path / "run", 4, CPU, trace)
    phases = found["phases_ms"]
    assert {"data", "agree", "forward", "backward", "optimizer"} <= set(phases)
    assert found["tokens_per_s"] > 0 and found["step_ms"] > 0
    assert json.loads(trace.read_text())["traceEvents"]
    with no_measuring(), pytest.raises(ConfigError, match="is there already"):
        measure_step(CONFIG, tmp_path / "again", 4, CPU, trace)


def test_the_dense_twin_is_as_wide_as_a_token_meets(tmp_path):
    with no_measuring():
        found = compare_with_dense(CONFIG, tmp_path, 8, 2, CPU)
    moe, dense = found["active_parameters"]["moe"], found["active_parameters"]["dense"]
    layers = sum(spec.repeat for spec in CONFIG.model.layers.specs() if spec.ffn is not None)
    assert moe - dense == layers * CONFIG.moe.num_experts * CONFIG.model.dim, "routers are all that differs"
    assert found["total_parameters"]["moe"] > found["total_parameters"]["dense"] == dense
    assert [point["step"] for point in found["curves"]["moe"]] == [4, 8]
    assert found["loss"]["tokens"]["at"] == 8 * found["tokens_per_step"]
    assert found["loss"]["tokens"]["moe"] == found["curves"]["moe"][-1]["loss"]
    assert found["loss"]["flops"]["at"] < found["curves"]["moe"][-1]["flops"], "the dense one has done less by then"
    json.dumps(found)


def test_a_model_without_a_twin_is_refused():
    shared = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, shared_hidden_dim=8))
    with pytest.raises(ConfigError, match="no dense twin"):
        dense_twin(shared)


def test_losses_are_compared_where_both_have_been():
    moe = [Point(1, 10, 30, 4, 3.0), Point(2, 20, 60, 8, 2.0)]
    dense = [Point(1, 10, 20, 1, 3.5), Point(2, 20, 40, 2, 2.5)]
    assert losses_at_equal(moe, dense, "tokens") == {"at": 20, "moe": 2.0, "dense": 2.5}
    flops = losses_at_equal(moe, dense, "flops")
    assert flops["at"] == 40 and flops["dense"] == 2.5 and flops["moe"] == pytest.approx(3.0 - 1 / 3)
    assert losses_at_equal(moe, dense, "seconds") == {"at": 2, "moe": 3.0, "dense": 2.5}, "before its first evaluation"
    assert loss_at(moe, "tokens", 15) == 2.5
