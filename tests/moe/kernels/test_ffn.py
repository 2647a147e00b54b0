"""Fused experts, function and gradients, against the loop; compiled for GPUs ahead of time; what falls back, and how it
is said."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from moedist.moe.balance.bias import BiasConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.auto import AutoConfig
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.fused import FusedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.kernels import ffn
from moedist.moe.kernels.device import why_not
from moedist.moe.layer import MoEConfig, experts_notes
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit
from tests.moe.kernels.conftest import by_twins
from tests.moe.test_experts import ACTIVATIONS, TOLERANCE, filled, rows_of, run
from tests.parity import HIDDEN, NUM_EXPERTS, SCENES, Scene, compare, many_ranks, one_device
from tests.ranks import Here

CPU = torch.device("cpu")


def against_loop(dim: int, hidden: int, sizes: Sequence[int], dtype: torch.dtype, **settings: Any) -> None:
    """Output and every gradient."""
    fused, loop = (
        run(config(hidden_dim=hidden, **settings), sizes, dim, dtype) for config in (FusedConfig, LoopConfig)
    )
    for name, expected in loop.items():
        scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
        torch.testing.assert_close(
            fused[name],
            expected,
            atol=TOLERANCE.get(dtype, 5e-3) * scale,
            rtol=0,
            msg=lambda text, n=name: f"{n}, {dtype}, {sizes}, {settings}: {text}",
        )


def one_case(here: Here) -> None:
    """Widths and sizes that fill no tile, and an expert without rows."""
    against_loop(20, 12, (3, 0, 18), torch.float64, activation="swiglu")


def test_fused_equals_loop(interpreter):
    interpreter(1).run(one_case)


def many_cases(here: Here) -> None:
    sizes = ((3, 0, 18, 2), (0, 0, 0, 0), (0, 0, 7, 0), (16, 32, 0, 0))
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for turn, (activation, bias) in enumerate(itertools.product(ACTIVATIONS, (False, True))):
        for place, dtype in enumerate(dtypes):
            dim, hidden = ((20, 36), (16, 32), (1, 1))[(turn + place) % 3]
            against_loop(dim, hidden, sizes[(turn + place) % 4], dtype, activation=activation, bias=bias)


@pytest.mark.slow
def test_fused_equals_loop_in_every_dtype(interpreter):
    interpreter(1).run(many_cases, limit_s=300)


def a_tail_of_nobody(here: Here) -> None:
    """Rows past the last end, poisoned: zero out, zero gradient, and no trace in anybody's weights."""
    experts = filled(FusedConfig(hidden_dim=12), 20, 3, torch.float64)
    rows = rows_of((3, 0, 18, 19), 20, torch.float64)
    x_RD = rows.x_RD.detach().clone()
    x_RD[21:] = torch.nan
    got = Rows(x_RD.requires_grad_(), rows.gate_R, rows.sizes, rows.ends_e[:3])
    experts(got).square().sum().backward()
    assert not experts(got)[21:].any() and not got.x_RD.grad[21:].any() and not rows.gate_R.grad[21:].any()
    twin = filled(LoopConfig(hidden_dim=12), 20, 3, torch.float64)
    alone = rows_of((3, 0, 18, 19), 20, torch.float64)
    twin(Rows(alone.x_RD[:21], alone.gate_R[:21], (3, 0, 18), rows.ends_e[:3])).square().sum().backward()
    torch.testing.assert_close(got.x_RD.grad, alone.x_RD.grad, atol=1e-13, rtol=0)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(experts.get_parameter(name).grad, parameter.grad, atol=1e-13, rtol=0)


@pytest.mark.slow
def test_rows_past_the_last_end(interpreter):
    interpreter(1).run(a_tail_of_nobody)


def saved(here: Here) -> int:
    """Bytes that forward keeps, the experts' own weights left out; and that it keeps none without gradients."""
    experts = filled(FusedConfig(hidden_dim=24), 16, 4, torch.bfloat16)
    rows, kept = rows_of((3, 0, 18, 2), 16, torch.bfloat16), {}
    weights = {parameter.data_ptr() for parameter in experts.parameters()}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        y_RD = experts(rows)
    with torch.no_grad(), mock.patch.object(ffn, "ffn_forward", wraps=ffn.ffn_forward) as forward:
        assert torch.equal(experts(rows), y_RD)
    assert forward.call_args.args[-1] is False, "products were kept for a backward that cannot come"
    return sum(kept.values())


@pytest.mark.slow
def test_products_and_rows_are_all_that_is_saved(interpreter):
    rows, dim, hidden, experts = 23, 16, 24, 4
    assert interpreter(1).run(saved) == [2 * rows * dim + 4 * rows * hidden + 4 * rows + 4 * experts]


def saved_by_a_layer(here: Here) -> list[float]:
    """Bytes that a layer on one device keeps, over the least: the tokens and the products in front of the activation;
    fused and as a loop."""
    ratios, (num_tokens, dim, hidden, top_k) = [], (64, 128, 256, 2)
    for experts in (FusedConfig(hidden_dim=hidden), LoopConfig(hidden_dim=hidden)):
        config = MoEConfig(4, TopKConfig(top_k=top_k), CapacityConfig(factor=None), experts=experts)
        layer, kept = config.build(dim, dtype=torch.bfloat16), {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        x_TD = torch.randn(num_tokens, dim, dtype=torch.bfloat16, requires_grad=True)

        def see(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            output = layer(x_TD, TokenContext.of_rows(1, num_tokens))
        assert output.out_TD.requires_grad
        least = 2 * num_tokens * dim + 4 * num_tokens * top_k * hidden
        ratios.append(sum(size for place, size in kept.items() if place not in weights) / least)
    return ratios


@pytest.mark.slow
def test_a_layer_on_one_device_saves_little_more_than_it_must(interpreter):
    """The router's copy of the tokens in fp32 is the most of the rest."""
    ((fused, loop),) = interpreter(1).run(saved_by_a_layer)
    assert fused <= 1.3 < loop, (fused, loop)


def parity_cases() -> Iterator[tuple[MoEConfig, Scene]]:
    kinds = itertools.cycle([("swiglu", False), ("gelu", True), ("relu", False), ("swiglu", True)])
    policies = itertools.cycle(("probability", "choice", "token"))
    choices = itertools.cycle(({}, {"score": "sigmoid"}, {"groups": GroupLimit(num_groups=2, top_groups=2)}))
    balances = itertools.cycle(({}, {"bias": BiasConfig()}))
    for dispatch, (top_k, factor), scene in itertools.product(
        (AllToAllConfig(), PaddedConfig()), ((1, 1.0), (2, 0.75), (3, 1.25)), SCENES
    ):
        activation, bias = next(kinds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a factor below 1 is the point here
            capacity = CapacityConfig(factor=factor, drop_policy=next(policies))
        experts = FusedConfig(hidden_dim=HIDDEN, activation=activation, bias=bias)
        router = TopKConfig(top_k=top_k, **next(choices))
        yield MoEConfig(NUM_EXPERTS, router, capacity, dispatch, experts, balance=next(balances)), scene


def parity(here: Here, ep: int) -> tuple[float, int]:
    """The worst difference, and the pairs that were dropped."""
    worst, dropped = 0.0, 0
    for config, scene in parity_cases():
        with by_twins():
            expected = one_device(config, scene, here.world)
        try:
            worst = max(worst, compare(many_ranks(config, scene, here.mesh_of(ep)), expected))
        except AssertionError as error:
            raise AssertionError(f"{error} in scene {scene.name}: {config}") from error
        asked = sum(int(scene.valid_T(rank).sum()) for rank in range(here.world)) * config.router.top_k
        dropped += asked - int(expected.kept_E.sum())
    return worst, dropped


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_ranks_equal_one_device(interpreter, ep):
    """The oracle of the parity suite is plain torch; here all kernels are held against it, over ranks."""
    for worst, dropped in interpreter(4).run(parity, ep, limit_s=600):
        assert worst <= 1e-12 and dropped > 0


def whole_graph(here: Here) -> None:
    """A layer with fixed slots compiles into one graph, kernels and all."""
    config = MoEConfig(4, capacity=CapacityConfig(1.0), dispatch=PaddedConfig(), experts=FusedConfig(hidden_dim=12))
    layer = config.build(8, dtype=torch.float64)
    ctx, x_TD = TokenContext.of_rows(2, 8), torch.randn(16, 8, dtype=torch.float64)
    outputs = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        out_TD = call(x_TD, ctx).out_TD
        out_TD.square().sum().backward()
        outputs.append([out_TD.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_fixed_slots_compile_into_one_graph(interpreter):
    interpreter(1).run(whole_graph, limit_s=120)


@pytest.mark.parametrize("config", [FusedConfig, AutoConfig])
@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.float32), (12, torch.float64)])
def test_a_cpu_runs_the_twin(config, dim, dtype):
    """To the bit: fused as the loop, auto as what the defaults choose."""
    twin = LoopConfig if config is FusedConfig else GroupedConfig
    settings = {"hidden_dim": 16, "bias": True}
    expected = run(twin(**settings), (3, 0, 5, 2), dim, dtype)
    for name, value in run(config(**settings), (3, 0, 5, 2), dim, dtype).items():
        assert torch.equal(value, expected[name]), name


def test_what_runs_is_said_once():
    def said(experts: Any, dispatch: Any, dtype: torch.dtype = torch.float32) -> list[str]:
        layers = [MoEConfig(4, dispatch=dispatch, experts=experts).build(dim, device="meta") for dim in (16, 16)]
        return experts_notes(torch.nn.ModuleList(layers), CPU, dtype)

    reason = "Triton's kernels need a GPU, not cpu"
    assert why_not(CPU, "ffn") == reason
    assert said(LoopConfig(), AllToAllConfig()) == said(GroupedConfig(), AllToAllConfig()) == []
    assert said(FusedConfig(), AllToAllConfig()) == [f"moe/experts=fused runs as loop: {reason}"]
    assert said(AutoConfig(hidden_dim=20), PaddedConfig()) == [f"moe/experts=auto runs as grouped: {reason}"]
    assert said(AutoConfig(hidden_dim=20), AllToAllConfig()) == [f"moe/experts=auto runs as grouped: {reason}"]
    assert said(AutoConfig(hidden_dim=20), AllToAllConfig(), torch.float64) == [
        f"moe/experts=auto runs as grouped: {reason}"
    ]
    (line,) = said(AutoConfig(hidden_dim=20), AllToAllConfig(), torch.bfloat16)
    assert line.startswith(f"moe/experts=auto runs as loop: {reason}, and grouped products need")
    assert line.endswith("not bfloat16 in 16 and 20")


def test_fused_and_auto_are_configured_as_the_others():
    grouped = {field.name: field.default for field in dataclasses.fields(GroupedConfig)}
    for config in (FusedConfig, AutoConfig):
        assert {field.name: field.default for field in dataclasses.fields(config)} == grouped
