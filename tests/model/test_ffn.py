"""Feed-forward choices."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from moedist.config import ConfigError
from moedist.model.ffn.dense import Dense, DenseConfig
from moedist.model.ffn.moe import MoEFFNConfig
from moedist.model.init import init_weights
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig
from moedist.moe.router.topk import TopKConfig


def build_dense(config: DenseConfig, dim: int) -> Dense:
    module = config.build(dim, layer=0, moe=MoEConfig(), output_scale=0.5, dtype=torch.float64)
    init_weights(module, 0)
    return module


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_dense_equals_its_formula(activation):
    module = build_dense(DenseConfig(12, activation), 8)
    x_BSD = torch.randn(2, 3, 8, dtype=torch.float64)
    up = x_BSD @ module.up.weight.T
    hidden = {
        "swiglu": lambda: silu(x_BSD @ module.gate.weight.T) * up,
        "gelu": lambda: gelu(up),
        "relu": lambda: relu(up),
    }[activation]()
    got = module(x_BSD, TokenContext.of_rows(2, 3))
    torch.testing.assert_close(got.out_BSD, hidden @ module.down.weight.T, rtol=1e-12, atol=1e-12)
    assert got.report is None and not module.has_report


def test_default_width_keeps_the_parameters_of_a_two_matrix_layer():
    assert build_dense(DenseConfig(), 96).up.weight.shape == (256, 96)
    assert build_dense(DenseConfig(), 100).up.weight.shape == (320, 100)  # 266.7 rounded up to 64s
    assert build_dense(DenseConfig(activation="gelu"), 100).up.weight.shape == (400, 100)
    assert [name for name, _ in build_dense(DenseConfig(activation="relu"), 8).named_parameters()] == [
        "up.weight",
        "down.weight",
    ]


def test_moe_is_the_runs_unless_it_brings_its_own():
    run = MoEConfig(num_experts=4, router=TopKConfig(top_k=2))
    module = MoEFFNConfig().build(8, layer=3, moe=run, output_scale=1.0)
    assert module.moe.config is run and module.moe.layer == 3 and module.has_report
    own = MoEConfig(num_experts=6, router=TopKConfig(top_k=1))
    assert MoEFFNConfig(own).build(8, layer=0, moe=run, output_scale=1.0).moe.config is own


@pytest.mark.requirement("R3-17")
def test_moe_sees_the_rows_one_after_the_other():
    module = MoEFFNConfig().build(8, layer=0, moe=MoEConfig(num_experts=4), output_scale=1.0)
    x_BSD, context = torch.randn(2, 3, 8), TokenContext.of_rows(2, 3)
    got = module(x_BSD, context)
    want = module.moe(x_BSD.reshape(6, 8), context)
    assert torch.equal(got.out_BSD, want.out_TD.reshape(2, 3, 8))
    assert torch.equal(got.report.asked_E, want.report.asked_E)


def test_hidden_dim_must_be_a_width():
    with pytest.raises(ConfigError, match="hidden_dim = 0 is too small. Set it to 1 or more, or to null"):
        DenseConfig(0)
