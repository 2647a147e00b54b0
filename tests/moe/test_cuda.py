"""The heart on a GPU: the same numbers as on the CPU, and no host wait where none is promised."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoE, MoEConfig

pytestmark = pytest.mark.gpu

DISPATCHERS = [AllToAllConfig(), PaddedConfig()]


def config_of(dispatch: DispatchConfig) -> MoEConfig:
    return MoEConfig(
        num_experts=8,
        capacity=CapacityConfig(factor=1.0),
        dispatch=dispatch,
        experts=GroupedConfig(hidden_dim=64),
        shared_hidden_dim=32,
    )


def run(layer: MoE, x_TD: torch.Tensor, ctx: TokenContext) -> list[torch.Tensor]:
    """Output and all gradients."""
    x_TD = x_TD.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x_TD, ctx)
    loss = output.out_TD.float().square().sum() + output.report.losses["switch"] + output.report.losses["z_loss"]
    loss.backward()
    grads = [x_TD.grad, *(parameter.grad for parameter in layer.parameters())]
    return [value.detach().clone() for value in (output.out_TD, *grads)]


@pytest.mark.parametrize("dispatch", DISPATCHERS, ids=lambda config: config.kind)
def test_gpu_equals_cpu_in_fp64(dispatch: DispatchConfig) -> None:
    config = dataclasses.replace(config_of(dispatch), experts=LoopConfig(hidden_dim=64))
    layer = config.build(32, dtype=torch.float64)
    x_TD = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = run(layer, x_TD, TokenContext.of_rows(4, 16))
    got = run(layer.cuda(), x_TD.cuda(), TokenContext.of_rows(4, 16, device="cuda"))
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=1e-12 * float(reference.abs().max().clamp(1)))


@pytest.mark.parametrize("dispatch", DISPATCHERS, ids=lambda config: config.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_equals_loop(dispatch: DispatchConfig, dtype: torch.dtype) -> None:
    config = config_of(dispatch)
    layer = config.build(32).to("cuda", dtype)
    twin = dataclasses.replace(config, experts=LoopConfig(hidden_dim=64)).build(32).to("cuda", dtype)
    x_TD = torch.randn(64, 32, device="cuda").to(dtype)
    ctx = TokenContext.of_rows(4, 16, device="cuda")
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for value, reference in zip(run(layer, x_TD, ctx), run(twin, x_TD, ctx), strict=True):
        assert (value - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.requirement("R1-34")
@pytest.mark.parametrize(("dispatch", "waits"), [(PaddedConfig(), 0), (AllToAllConfig(), 1)])
def test_host_waits_per_layer(dispatch: DispatchConfig, waits: int) -> None:
    layer = config_of(dispatch).build(32).to("cuda", torch.bfloat16)
    x_TD = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ctx = TokenContext.of_rows(4, 16, device="cuda")
    run(layer, x_TD.detach(), ctx)  # what is made once (handles, caches) is made now
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = layer(x_TD, ctx)
            sum(output.report.losses.values(), output.out_TD.float().sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    synchronizing = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    assert len(synchronizing) == waits, synchronizing


def test_two_runs_are_bitwise_equal() -> None:
    layer = config_of(PaddedConfig()).build(32).to("cuda", torch.bfloat16)
    x_TD = torch.randn(256, 32, device="cuda", dtype=torch.bfloat16)
    ctx = TokenContext.of_rows(4, 64, device="cuda")
    for first, second in zip(run(layer, x_TD, ctx), run(layer, x_TD, ctx), strict=True):
        assert torch.equal(first, second)
