"""Grouped experts against the loop, idle experts, layouts that kernels refuse, and first values."""

from __future__ import annotations

import math

import pytest
import torch

from moedist.config import ConfigError
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.grouped import GroupedConfig, qualifies
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.ffn import SharedExpert
from moedist.moe.init import named_draw
from moedist.moe.layer import MoEConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import routing_of

ACTIVATIONS = ("swiglu", "gelu", "relu")


def rows_of(sizes, dim, dtype=torch.float32, uniform=False):
    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(sum(sizes), dim, generator=generator).to(dtype).requires_grad_()
    gate_R = torch.rand(sum(sizes), generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    ends_e = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return Rows(x_RD, gate_R.requires_grad_(), tuple(sizes), ends_e, uniform)


def filled(config, dim, num_experts, dtype):
    """Experts whose biases are not zero either."""
    experts = config.build(dim, num_experts, dtype=dtype)
    experts.init_weights(named_draw(0))
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    return experts


def run(config, sizes, dim, dtype, uniform=False):
    """Outputs and all gradients of a loss that weighs every element differently."""
    experts, rows = filled(config, dim, len(sizes), dtype), rows_of(sizes, dim, dtype, uniform)
    y_RD = experts(rows)
    assert y_RD.dtype == dtype and y_RD.shape == rows.x_RD.shape
    (y_RD * torch.linspace(-1, 1, y_RD.numel()).view_as(y_RD).to(dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y_RD.detach(), "x": rows.x_RD.grad, "gate": rows.gate_R.grad, **grads}


SIZES = {"uneven": (3, 0, 5, 2), "none": (0, 0, 0, 0), "one": (0, 0, 7, 0), "ends empty": (4, 1, 0, 0)}
# fp32 sums in another order; bf16 keeps 8 bits, and products of three matrices round thrice.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.05}


@pytest.mark.pitfall("23")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_equals_loop(activation, bias, sizes, dtype):
    """Widths of 12 and 20 qualify in fp32 and not in bf16, 16 and 24 in both; fp64 never does (pitfall 23)."""
    for dim, hidden in ((12, 20), (16, 24)):
        settings = {"hidden_dim": hidden, "activation": activation, "bias": bias}
        grouped = run(GroupedConfig(**settings), sizes, dim, dtype)
        loop = run(LoopConfig(**settings), sizes, dim, dtype)
        for name, expected in loop.items():
            scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
            torch.testing.assert_close(
                grouped[name], expected, atol=TOLERANCE[dtype] * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fixed_slots_equal_loop(activation):
    settings = {"hidden_dim": 20, "activation": activation, "bias": True}
    grouped = run(GroupedConfig(**settings), (5, 5, 5), 12, torch.float32, uniform=True)
    for name, expected in run(LoopConfig(**settings), (5, 5, 5), 12, torch.float32).items():
        torch.testing.assert_close(grouped[name], expected, atol=1e-5, rtol=0)


def test_what_qualifies():
    assert qualifies(torch.float32, 12, 20) and qualifies(torch.bfloat16, 16, 24)
    assert not qualifies(torch.bfloat16, 12) and not qualifies(torch.bfloat16, 16, 20)
    assert not qualifies(torch.float32, 10) and not qualifies(torch.float64, 16) and not qualifies(torch.float16, 16)


def by_formula(activation, bias):
    """One expert, one row, in fp64, from the formula in the docstring."""
    experts = filled(LoopConfig(hidden_dim=5, activation=activation, bias=bias), 4, 1, torch.float64)
    rows = rows_of((1,), 4, torch.float64)
    x, g = rows.x_RD[0], rows.gate_R[0]
    part = {name: parameter[0] for name, parameter in experts.named_parameters()}
    zero = torch.zeros(())
    up = part["up"].t() @ x + part.get("up_bias", zero)
    if activation == "swiglu":
        gate = part["gate"].t() @ x + part.get("gate_bias", zero)
        hidden = gate * torch.sigmoid(gate) * up
    elif activation == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    else:
        hidden = up.clamp_min(0)
    return experts(rows)[0], g * (part["down"].t() @ hidden + part.get("down_bias", zero))


@pytest.mark.requirement("R0-11", "R3-11", "C1")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_by_the_formula(activation, bias):
    got, expected = by_formula(activation, bias)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


@pytest.mark.pitfall("4")
@pytest.mark.parametrize("config", [LoopConfig, GroupedConfig])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (4, 0, 2)])
def test_idle_experts_have_zero_gradients_never_none(config, sizes):
    """Pitfall 4, gate P10."""
    grads = run(config(hidden_dim=16, bias=True), sizes, 16, torch.float32)
    for name in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias"):
        assert grads[name] is not None, name
        for expert, size in enumerate(sizes):
            assert (grads[name][expert].abs().max() > 0) == (size > 0), (name, expert)


@pytest.mark.parametrize("config", [LoopConfig, GroupedConfig])
def test_a_rank_without_experts(config):
    experts = config(hidden_dim=16, bias=True).build(16, 4)
    experts.keep(())
    rows = rows_of((), 16)
    y_RD = experts(rows)
    y_RD.sum().backward()
    assert y_RD.shape == (0, 16)
    assert all(parameter.grad is not None for parameter in experts.parameters())


@pytest.mark.pitfall("23")
@pytest.mark.parametrize(("dim", "hidden"), [(12, 20), (16, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_gradients_and_poisoned_memory(dim, hidden, dtype):
    """Pitfall 23: ``sum().backward()`` hands grouped_mm a gradient of stride 0, and whatever it leaves uninitialised
    reads as NaN here."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        assert torch.empty(4).isnan().all()
        experts, rows = filled(GroupedConfig(hidden_dim=hidden), dim, 4, dtype), rows_of((3, 0, 5, 2), dim, dtype)
        for _ in range(2):
            experts(rows).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for value in (rows.x_RD, rows.gate_R, *experts.parameters()):
        assert value.grad.isfinite().all()


@pytest.mark.requirement("R0-13", "D1")
@pytest.mark.pitfall("7")
@pytest.mark.parametrize("config", [LoopConfig, GroupedConfig])
def test_first_values_depend_on_the_global_id_alone(config):
    """Pitfall 7: equal at any layout, before or after the experts are dealt out."""
    whole = config(hidden_dim=8).build(6, 8)
    whole.init_weights(named_draw(3, "bank"))
    for ids in ((0, 1, 2, 3), (6, 7), (5,), (7, 0, 3)):
        kept_first = config(hidden_dim=8).build(6, 8)
        kept_first.keep(ids)
        kept_first.init_weights(named_draw(3, "bank"))
        kept_later = config(hidden_dim=8).build(6, 8)
        kept_later.init_weights(named_draw(3, "bank"))
        kept_later.keep(ids)
        assert kept_first.expert_ids == kept_later.expert_ids == ids
        for name, parameter in whole.named_parameters():
            assert torch.equal(kept_first.get_parameter(name), parameter[list(ids)])
            assert torch.equal(kept_later.get_parameter(name), parameter[list(ids)])
    for name, parameter in whole.named_parameters():
        for one in range(8):
            for other in range(one):
                assert not torch.equal(parameter[one], parameter[other]), f"{name}: experts {one} and {other} are equal"


def test_keep_twice_goes_by_global_id():
    experts = LoopConfig(hidden_dim=8).build(6, 8)
    experts.init_weights(named_draw(0))
    before = experts.up.detach().clone()
    experts.keep((6, 2, 4))
    experts.keep((4, 6))
    assert torch.equal(experts.up, before[[4, 6]])


@pytest.mark.requirement("R0-13", "R0-14", "C22")
def test_first_values_have_xavier_spread():
    experts = LoopConfig(hidden_dim=150, bias=True).build(50, 20)
    experts.init_weights(named_draw(0))
    for name in ("up", "gate", "down"):
        assert experts.get_parameter(name).std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)
        assert experts.get_parameter(name).mean().item() == pytest.approx(0, abs=1e-3)
    assert all((experts.get_parameter(f"{name}_bias") == 0).all() for name in ("up", "gate", "down"))


def test_first_values_are_the_same_in_every_dtype():
    values = []
    for dtype in (torch.float32, torch.float64):
        experts = LoopConfig(hidden_dim=8).build(6, 2, dtype=dtype)
        experts.init_weights(named_draw(0))
        values.append(experts.up.float())
    assert torch.equal(*values)


@pytest.mark.requirement("D1")
def test_identical_experts_make_routing_irrelevant():
    """With gates that sum to 1, equal experts give the same output whatever the router says (seed 2's fault)."""
    from moedist.moe.context import TokenContext

    layer = MoEConfig(num_experts=4).build(8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.bank.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    x_TD = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ctx = TokenContext.of_rows(1, 6)
    outputs = []
    for experts, gates in (([[0, 1]] * 6, [[0.7, 0.3]] * 6), ([[3, 2]] * 6, [[0.5, 0.5]] * 6)):
        from tests.moe.by_hand import dropless

        outputs.append(layer.bank(x_TD, dropless(routing_of(experts, 4, gates), ctx)))
    torch.testing.assert_close(*outputs, atol=1e-15, rtol=0)
    other = MoEConfig(num_experts=4).build(8, dtype=torch.float64)
    unlike = [other.bank(x_TD, dropless(routing_of([[one]] * 6, 4, [[1.0]] * 6), ctx)) for one in range(2)]
    assert (unlike[0] - unlike[1]).abs().max() > 1e-3


def test_shared_expert_equals_a_routed_one():
    experts = filled(LoopConfig(hidden_dim=10, bias=True), 6, 1, torch.float64)
    rows = rows_of((5,), 6, torch.float64)
    ones = Rows(rows.x_RD, torch.ones(5).double(), rows.sizes, rows.ends_e)
    assert torch.equal(SharedExpert(experts)(rows.x_RD), experts(ones))


@pytest.mark.requirement("R0-09", "R3-11")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_parameter_counts(activation, bias):
    config = LoopConfig(hidden_dim=None, activation=activation, bias=bias)
    experts = config.build(6, 3)
    assert config.width(6) == 24
    assert sum(parameter.numel() for parameter in experts.parameters()) == 3 * config.expert_parameters(6)
    matmul = sum(p.numel() for n, p in experts.named_parameters() if not n.endswith("bias"))
    assert matmul == 3 * config.expert_matmul_parameters(6)


def test_errors():
    with pytest.raises(ConfigError, match="hidden_dim = 0 is no width. Set it to 1 or more, or to null"):
        GroupedConfig(hidden_dim=0)


@pytest.mark.parametrize("config", [LoopConfig, GroupedConfig])
def test_R0_17_relu_cuts_off_all_that_is_negative(config):
    """Then the output is the second bias, to the bit."""
    experts = config(hidden_dim=16, activation="relu", bias=True).build(8, 2)
    with torch.no_grad():
        experts.up.zero_(), experts.up_bias.fill_(-1), experts.down.fill_(3), experts.down_bias.fill_(42)
    rows = rows_of((3, 2), 8)
    y_RD = experts(Rows(rows.x_RD, torch.ones(5), rows.sizes, rows.ends_e))
    assert torch.equal(y_RD, torch.full((5, 8), 42.0))


@pytest.mark.parametrize("init", ["xavier_normal", "xavier_uniform"])
def test_C22_first_values_are_normal_or_uniform(init):
    """Of the same spread; a uniform one ends at sqrt(3) of it, a normal one does not."""
    layer = MoEConfig(
        4, TopKConfig(init=init), experts=LoopConfig(hidden_dim=100, bias=True, init=init), shared_hidden_dim=100
    ).build(60)
    two_maps = MLPConfig(hidden_dim=100, init=init).build(60, 50)
    two_maps.init_weights(named_draw(0))
    matrices = [*(p for n, p in layer.bank.experts.named_parameters() if "bias" not in n), layer.shared.expert.up[0]]
    matrices += [two_maps.hidden_weight, two_maps.weight, layer.router.weight]
    for matrix in matrices:
        std = math.sqrt(2 / sum(matrix.shape[-2:]))
        assert matrix.std().item() == pytest.approx(std, rel=0.1)
        assert (matrix.abs().max().item() <= math.sqrt(3) * std) == (init == "xavier_uniform")
    assert not layer.bank.experts.down_bias.any() and not two_maps.bias.any()
    assert (TopKConfig().init, MLPConfig().init, LoopConfig().init) == (
        "xavier_normal",
        "xavier_uniform",
        "xavier_normal",
    )
