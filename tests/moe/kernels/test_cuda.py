"""Kernels on a GPU: every one against fp64, host waits, a CUDA graph, saved bytes, two runs alike."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import torch

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.auto import AutoConfig
from moedist.moe.experts.fused import FusedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.kernels.device import why_not
from moedist.moe.layer import MoE, MoEConfig
from tests.moe.kernels.test_pairs import choices, choices_by_score, moved
from tests.moe.test_experts import ACTIVATIONS, filled, rows_of
from tests.ranks import Here

pytestmark = pytest.mark.gpu

DISPATCHERS = [PaddedConfig(), AllToAllConfig()]
# Of the largest entry: fp32 sums in another order, fp16 keeps 11 bits and bf16 8, and three products round in turn.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def layer_of(dispatch: Any, dtype: torch.dtype, **settings: Any) -> tuple[MoE, torch.Tensor, TokenContext]:
    experts = FusedConfig(hidden_dim=64)
    config = MoEConfig(8, capacity=CapacityConfig(1.0), dispatch=dispatch, experts=experts, **settings)
    layer = config.build(32).to("cuda", dtype)
    x_TD = torch.randn(64, 32, device="cuda", dtype=dtype, requires_grad=True)
    return layer, x_TD, TokenContext.of_rows(4, 16, device="cuda")


def step(layer: MoE, x_TD: torch.Tensor, ctx: TokenContext) -> list[torch.Tensor]:
    """Output and all gradients, fresh."""
    inputs = [x_TD, *layer.parameters()]
    output = layer(x_TD, ctx)
    loss = sum(output.report.losses.values(), output.out_TD.float().square().sum())
    return [output.out_TD, *torch.autograd.grad(loss, inputs)]


def test_kernels_run_here():
    device = torch.device("cuda", torch.cuda.current_device())
    assert why_not(device, "ffn") is None and why_not(device, "pairs") is None
    (note,) = {AutoConfig().build(8, 2).note(device, torch.bfloat16, uniform) for uniform in (False, True)}
    assert "auto runs as fused" in note


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_equal_the_loop_in_fp64(activation, dtype):
    """The twin gets what the narrow type has made of the same numbers."""
    sizes, settings = (37, 0, 130, 1), {"activation": activation, "bias": activation != "swiglu"}
    for dim, hidden in ((40, 72), (128, 256)):
        results = []
        for config, device, wide in ((FusedConfig, "cuda", dtype), (LoopConfig, "cpu", torch.float64)):
            experts = filled(config(hidden_dim=hidden, **settings), dim, 4, torch.float64).to(dtype).to(device, wide)
            rows = rows_of(sizes, dim, dtype)
            x_RD, gate_R = rows.x_RD.detach().to(device, wide), rows.gate_R.detach().to(device)
            gate_R = gate_R.double() if wide == torch.float64 else gate_R
            rows = dataclasses.replace(
                rows, x_RD=x_RD.requires_grad_(), gate_R=gate_R.requires_grad_(), ends_e=rows.ends_e.to(device)
            )
            y_RD = experts(rows)
            weight_RD = torch.linspace(-1, 1, y_RD.numel(), dtype=torch.float64).view(y_RD.shape).to(dtype)
            y_RD.backward(weight_RD.to(device, wide))
            grads = [value.grad for value in (x_RD, gate_R, *experts.parameters())]
            results.append([value.detach().double().cpu() for value in (y_RD, *grads)])
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(1e-3)


def test_pairs_equal_their_twins():
    choices(Here(0, 1), "cuda")
    choices_by_score(Here(0, 1), "cuda")
    moved(Here(0, 1), "cuda")


@pytest.mark.parametrize(("dispatch", "waits"), list(zip(DISPATCHERS, (0, 1), strict=True)))
def test_host_waits_per_layer(dispatch, waits):
    layer, x_TD, ctx = layer_of(dispatch, torch.bfloat16)
    step(layer, x_TD, ctx)  # what is made once (tilings, handles) is made now
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(layer, x_TD, ctx)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    synchronizing = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    assert len(synchronizing) == waits, synchronizing


def test_fixed_slots_are_captured_in_a_graph():
    layer, x_TD, ctx = layer_of(PaddedConfig(), torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, x_TD, ctx)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x_TD, ctx)
    for _ in range(2):
        with torch.no_grad():
            x_TD.normal_()
        graph.replay()
        for value, expected in zip(captured, step(layer, x_TD, ctx), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize(("dispatch", "dtype"), list(itertools.product(DISPATCHERS, (torch.float32, torch.bfloat16))))
def test_two_runs_are_bitwise_equal(dispatch, dtype):
    layer, x_TD, ctx = layer_of(dispatch, dtype)
    for first, second in zip(step(layer, x_TD, ctx), step(layer, x_TD, ctx), strict=True):
        assert torch.equal(first, second)
