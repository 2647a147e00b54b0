from __future__ import annotations

import dataclasses

import pytest
import torch

from moedist.bench.floor import (
    Ceilings,
    exchange_bytes,
    fused_kernels,
    least_saved_bytes,
    least_seconds,
    unfused_kernels,
    useful_flops,
)
from moedist.bench.shapes import SHAPES, LayerShape

H100 = Ceilings(flops=800e12, bytes=3.0e12)
TABLE = {  # GEMM TFLOP, F2 ms, F3 ms, exchange of 8 ranks in ms at 450 GB/s
    "olmoe": (4.95, 6.71, 10.82, 4.18),
    "mixtral": (17.32, 21.87, 24.80, 1.04),
    "qwen3_30b_a3b": (3.71, 5.28, 8.97, 4.18),
    "deepseek_v3": (8.66 + 1.08, 12.61, 15.76, 3.65),
    "switch": (1.65, 2.41, 3.01, 0.52),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_published_shapes(name):
    shape = SHAPES[name]
    tflop, f2_ms, f3_ms, exchange_ms = TABLE[name]
    router = 6 * shape.tokens * shape.dim * shape.num_experts
    assert (useful_flops(shape) - router) / 1e12 == pytest.approx(tflop, abs=0.006)
    assert 1e3 * least_seconds(fused_kernels(shape), H100) == pytest.approx(f2_ms, abs=0.006)
    assert 1e3 * least_seconds(unfused_kernels(shape), H100) == pytest.approx(f3_ms, abs=0.006)
    # The slice of DeepSeek-V3 has rows for 256 experts of 8 ranks: as many as it brings.
    assert 1e3 * exchange_bytes(shape, 8) / 450e9 == pytest.approx(exchange_ms, abs=0.006)


def test_bytes_add_up_to_the_closed_form():
    shape = LayerShape("small", tokens=64, dim=32, hidden_dim=48, num_experts=4, top_k=2)
    t, d, f, e, n = shape.tokens, shape.dim, shape.hidden_dim, shape.num_experts, shape.pairs
    scores = 2 * 8 * t * e
    closed = 16 * n * d + 28 * n * f + 18 * e * d * f + 12 * t * d
    assert sum(kernel.bytes for kernel in fused_kernels(shape)) == closed + scores
    assert sum(kernel.flops for kernel in fused_kernels(shape)) == 18 * n * d * f + 6 * t * d * e
    plain = dataclasses.replace(shape, gated=False)
    assert sum(kernel.flops for kernel in fused_kernels(plain)) == 12 * n * d * f + 6 * t * d * e
    for each in (shape, plain):
        products = sum(kernel.flops for kernel in fused_kernels(each))
        assert sum(kernel.flops for kernel in unfused_kernels(each)) == products == useful_flops(each)


def test_ranks_share_the_weights_and_nothing_else():
    shape = LayerShape("small", tokens=64, dim=32, hidden_dim=48, num_experts=4, top_k=2)
    for kernels in (fused_kernels, unfused_kernels):
        whole, quarter = (sum(kernel.bytes for kernel in kernels(shape, ranks)) for ranks in (1, 4))
        weights = 18 * shape.num_experts * shape.dim * shape.hidden_dim
        assert whole - quarter == weights * 3 / 4
    assert exchange_bytes(shape, 1) == 0 and exchange_bytes(shape, 4) == 8 * 128 * 32 * 3 / 4


def test_saved_activations_at_least():
    shape = LayerShape("small", tokens=64, dim=32, hidden_dim=48, num_experts=4, top_k=2)
    assert least_saved_bytes(shape) == 2 * 64 * 32 + 4 * 128 * 48
    assert least_saved_bytes(dataclasses.replace(shape, dtype=torch.float32)) == 2 * (2 * 64 * 32 + 4 * 128 * 48)


def test_useful_work_counts_what_is_computed():
    shape = LayerShape("small", tokens=64, dim=32, hidden_dim=48, num_experts=4, top_k=2, shared_hidden_dim=16)
    dropped = useful_flops(shape) - useful_flops(shape, pairs=100)
    assert dropped == 18 * 28 * 32 * 48
    assert useful_flops(shape, pairs=0) == 6 * 64 * 32 * 4 + 18 * 64 * 32 * 16
