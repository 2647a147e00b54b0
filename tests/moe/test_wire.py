"""Rows in fewer bits: how far off they are, and that this depends neither on ranks nor on who computes them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigError
from moedist.launch.compose import compose
from moedist.mesh import Axis
from moedist.moe.bank.dispatched import DispatchedConfig
from moedist.moe.bank.local import LocalConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.budget import BudgetConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.dispatch.rows import Exchange
from moedist.moe.dispatch.traffic import Batch
from moedist.moe.dispatch.wire import Wire, rounded
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.placement import Placement
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import ScalingExperts, dropless, routing_of
from tests.moe.test_dispatch import hand_plan
from tests.parity import HIDDEN, NUM_EXPERTS, SCENES, Scene, compare, counted_bytes, many_ranks, one_device
from tests.ranks import Here

WIRES = ("bf16", "fp8")
DISPATCHES = {"all_to_all": AllToAllConfig, "padded": PaddedConfig, "budget": BudgetConfig}
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
CODES = CODES[CODES.isfinite()]


def rounded_by_hand(row_D: Tensor, dtype: str) -> Tensor:
    """One row (fp64), in fp8 by looking for the nearest number in a table of all there are."""
    if dtype == "bf16":
        return row_D.bfloat16().double()
    largest = float(row_D.abs().max())
    if largest == 0:
        return row_D
    scale = 2.0 ** (math.floor(math.log2(largest / 448)) + 1)
    return CODES[(row_D[:, None] / scale - CODES).abs().argmin(1)] * scale


def test_fp8_by_hand():
    """Scales 2, anything, 1/128; 17 / 2 is a tie, and goes to the even one."""
    rows = torch.tensor([[448, 1, 17, 0.3], [0, 0, 0, 0], [3, -3, 0, 0.001]])
    expected = [[448, 1, 16, 0.3125], [0, 0, 0, 0], [3, -3, 0, 0.0009765625]]
    assert rounded(rows, Wire("fp8")).tolist() == expected


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bounds(dtype: torch.dtype, wire: str):
    """The documented ones, element by element, over twelve magnitudes (six in fp16) inside each row."""
    generator = torch.Generator().manual_seed(0)
    spread = 3 if dtype == torch.float16 else 6
    exponent = torch.rand(400, 64, generator=generator, dtype=torch.float64) * 2 * spread - spread
    x_RD = (torch.randn(400, 64, generator=generator, dtype=torch.float64) * 10**exponent).to(dtype)
    off = (rounded(x_RD, Wire(wire)).double() - x_RD.double()).abs()
    if wire == "bf16":
        bound = x_RD.double().abs() / 256 if dtype.itemsize > 2 else torch.zeros(())
    else:
        largest = x_RD.double().abs().amax(1, keepdim=True)
        bound = torch.maximum(x_RD.double().abs() / 16, largest / 229376)
    assert (off <= bound * (1 + 1e-6)).all()
    assert (off > bound / 2).any() or not bound.any(), "the bound is not idle"


def test_every_element_becomes_the_nearest_code():
    x_RD = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([rounded_by_hand(row, "fp8") for row in x_RD])
    assert torch.equal(rounded(x_RD, Wire("fp8")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extremes(dtype: torch.dtype):
    """A finite row stays finite, to the last number of its type; one with a number that is none is none."""
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, 1, -largest], [1e-7, 0, -1e-7], [math.nan, 1, 2], [math.inf, 1, 2], [1, 2, 4]])
    found = rounded(rows.to(dtype), Wire("fp8")).double()
    assert found[:2].isfinite().all() and (found[0, 0] > 0.9 * largest) and (found[0, 2] == -found[0, 0])
    assert found[2:4].isnan().all() and found[4].tolist() == [1, 2, 4]
    narrow = rounded(rows.float(), Wire("bf16"))
    assert narrow[2].isnan().tolist() == [True, False, False] and narrow[3].isinf().tolist() == [True, False, False]
    assert rounded(torch.full((1, 3), 1e-40), Wire("fp8")).isfinite().all(), "a scale never vanishes"
    assert rounded(torch.zeros(0, 3), Wire("fp8")).shape == (0, 3)


@pytest.mark.parametrize("wire", WIRES)
def test_gradients_go_in_bf16(wire: str):
    x_RD = torch.randn(5, 8).requires_grad_()
    grad_RD = torch.randn(5, 8)
    rounded(x_RD, Wire(wire)).backward(grad_RD)
    assert torch.equal(x_RD.grad, grad_RD.bfloat16().float())
    narrow = x_RD.detach().bfloat16().requires_grad_()
    rounded(narrow, Wire(wire)).backward(grad_RD.bfloat16())
    assert torch.equal(narrow.grad, grad_RD.bfloat16())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", [*DISPATCHES, "local"])
def test_one_rank_by_hand(kind: str, wire: str):
    """Vectors there, outputs back and the gradients of both, each row by itself; gates and their gradients exact."""
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    gate_TK = torch.rand(4, 2, dtype=torch.float64, generator=generator).requires_grad_()
    grad_TD = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    expert_TK = [[0, 1], [0, 2], [0, 1], [2, 1]]
    plan = dropless(routing_of(expert_TK, 4, gate_TK), TokenContext.of_rows(1, 4))
    dispatch = DISPATCHES.get(kind, AllToAllConfig)(exchange_dtype=wire)
    bank = (LocalConfig() if kind == "local" else DispatchedConfig()).build(ScalingExperts(4), dispatch)
    out_TD = bank(x_TD, plan)
    out_TD.backward(grad_TD)

    out, x_grad, gate_grad = torch.zeros(4, 6).double(), torch.zeros(4, 6).double(), torch.zeros(4, 2).double()
    for token, choice in itertools.product(range(4), range(2)):
        scale, gate = expert_TK[token][choice] + 1.0, gate_TK[token, choice].detach()
        row, grad = rounded_by_hand(x_TD[token].detach(), wire), grad_TD[token].bfloat16().double()
        out[token] += rounded_by_hand(row * (gate * scale), wire)
        x_grad[token] += (grad * (gate * scale)).bfloat16().double()
        gate_grad[token, choice] = (grad * row).sum() * scale
    torch.testing.assert_close(out_TD.detach(), out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x_TD.grad, x_grad, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gate_TK.grad, gate_grad, rtol=1e-13, atol=1e-13)


def brought(rank: int) -> Tensor:
    """The tokens of a rank."""
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))


def travelling(here: Here, wire: str) -> tuple[list[int], bool, bool, bool]:
    """Bytes sent; whether rows arrive rounded and gates as they were; whether a NaN is seen where it belongs."""
    dispatcher = AllToAllConfig(exchange_dtype=wire).build(Placement.in_order(4, 2), here.mesh_of(2).ep)
    x_TD = brought(here.rank).requires_grad_()
    with counted_bytes() as sent:
        arrived = dispatcher.dispatch(x_TD, hand_plan())
        dispatcher.combine(arrived.rows.x_RD, arrived.ticket).sum().backward()
    # As `tests.moe.test_dispatch.test_packed_rows_over_two_ranks` draws it: expert, then rank, then token.
    lying = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 2), (1, 0), (1, 2)]
    gates = [0.9, 0.8] * 2 + [0.1, 0.3] * 2
    if here.rank == 1:
        lying, gates = [(0, 1), (0, 3), (1, 1), (1, 3)], [0.2, 0.6] * 2
    expected = torch.stack([rounded_by_hand(brought(rank)[token].double(), wire) for rank, token in lying])
    spoilt_TD = brought(here.rank)
    spoilt_TD[1, 5] = math.nan
    spoilt = dispatcher.dispatch(spoilt_TD, hand_plan())
    home = dispatcher.combine(spoilt.rows.x_RD, spoilt.ticket)
    return (
        sent,
        torch.equal(arrived.rows.x_RD.double(), expected),
        arrived.rows.gate_R.tolist() == gates,
        home.isnan().any(1).tolist() == [False, True, False, False],
    )


@pytest.mark.parametrize(("wire", "row"), [("bf16", 32), ("fp8", 16 + 4)])
def test_what_travels(ranks, wire: str, row: int):
    """Of rank 0's pairs two go to rank 1, of rank 1's four to rank 0; gates take 8 bytes, and gradients two each."""
    first, second = ranks(2).run(travelling, wire)
    counts, gate, grad = 16, 8, 32
    assert first[0] == [counts, 2 * (row + gate), 4 * row, 2 * grad, 4 * (grad + gate)]
    assert second[0] == [counts, 4 * (row + gate), 2 * row, 4 * grad, 2 * (grad + gate)]
    assert first[1:] == second[1:] == (True, True, True)


def one_row(here: Here, dim: int) -> list[bool]:
    """A row to the other rank, of so many elements that its gate begins between two numbers."""
    ep, found = here.mesh_of(2).ep, []
    gate_R = torch.tensor([0.1 + here.rank])
    for wire in (None, *WIRES):
        x_RD = brought(here.rank)[:1, :dim].bfloat16()
        sizes = [int(rank != here.rank) for rank in range(2)]
        x, gate = Exchange.apply(ep, Wire(wire), sizes, sizes, x_RD, gate_R)
        other = brought(1 - here.rank)[:1, :dim].bfloat16()
        found.append(torch.equal(x, rounded(other, Wire(wire))) and gate.item() == pytest.approx(1.1 - here.rank))
    return found


@pytest.mark.parametrize("dim", [5, 6])
def test_one_row_of_any_width(ranks, dim: int):
    assert ranks(2).run(one_row, dim) == [[True] * 3] * 2


def cases() -> Iterator[tuple[MoEConfig, Scene]]:
    """Dispatcher x wire; experts, limits and scenes take turns."""
    for turn, (kind, wire) in enumerate(itertools.product(DISPATCHES, WIRES)):
        config = MoEConfig(
            num_experts=NUM_EXPERTS,
            router=TopKConfig(top_k=2),
            capacity=CapacityConfig(factor=(1.0, None)[turn // 2 % 2]),
            experts=(LoopConfig, GroupedConfig)[turn % 2](hidden_dim=HIDDEN, bias=turn % 3 == 0),
            dispatch=DISPATCHES[kind](exchange_dtype=wire),
        )
        yield config, SCENES[turn // 2 % 2]


def cases_hold(here: Here, ep: int, some: Sequence[int]) -> tuple[float, float]:
    """The worst difference from one device that rounds, and the least of that from one that does not."""
    mesh, worst, least = here.mesh_of(ep), 0.0, math.inf
    for config, scene in (case for number, case in enumerate(cases()) if number in some):
        if isinstance(config.dispatch, BudgetConfig):  # blocks that hold whatever comes
            config = dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, factor=float(ep)))
        expected = one_device(config, scene, here.world)
        worst = max(worst, compare(many_ranks(config, scene, mesh), expected))
        exact = one_device(dataclasses.replace(config, dispatch=AllToAllConfig()), scene, here.world)
        least = min(least, *((expected.out[rank] - exact.out[rank]).abs().max().item() for rank in (0, 2)))
        moved = [(grad - exact.grad[name]).abs().max().item() for name, grad in expected.grad.items()]
        least = min(least, *moved)
    return worst, least


@pytest.mark.parametrize(
    ("ep", "some"), [(4, (1, 4)), *(pytest.param(ep, range(6), marks=pytest.mark.slow) for ep in (1, 2, 4))]
)
def test_ranks_equal_one_device(ranks, ep: int, some: Sequence[int]):
    """Outputs and every gradient."""
    for worst, least in ranks(4).run(cases_hold, ep, some):
        assert worst <= 1e-12
        assert least > 1e-6, "the rounding must be there"


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", ["padded", "budget"])
def test_the_layer_is_one_graph(kind: str, wire: str):
    torch._dynamo.reset()
    config = MoEConfig(
        num_experts=4, dispatch=DISPATCHES[kind](exchange_dtype=wire), experts=GroupedConfig(hidden_dim=32)
    )
    layer, results = config.build(16), []
    for each in (torch.compile(layer, fullgraph=True, backend="eager"), layer):
        layer.zero_grad()
        x_TD = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = each(x_TD, TokenContext.of_rows(3, 8, may_spill=True))
        output.out_TD.sum().backward()
        results.append([output.out_TD, x_TD.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rows_that_are_no_copies_name_no_source():
    plan, x_TD = hand_plan(), torch.randn(4, 16)
    for kind, wire in itertools.product(("all_to_all", "padded"), (None, *WIRES)):
        rows = (
            DISPATCHES[kind](exchange_dtype=wire).build(Placement.in_order(4, 1), Axis("ep")).dispatch(x_TD, plan).rows
        )
        assert (rows.source is None) == (wire is not None)


@pytest.mark.parametrize("kind", DISPATCHES)
def test_traffic(kind: str):
    """Of vectors: there and back in the wire's bytes, their gradients in bf16; what is narrow already stays."""
    batch = Batch(tokens=64, dim=16, num_experts=8, experts_per_token=2, capacity=16, ep=4, nodes=2, element_bytes=4)

    def vectors(wire: str | None, element_bytes: int) -> float:
        sized = dataclasses.replace(batch, element_bytes=element_bytes)
        config: DispatchConfig = DISPATCHES[kind](exchange_dtype=wire)
        traffic, bare = config.traffic(sized), config.traffic(dataclasses.replace(sized, dim=0))
        rows = bare.total / (8 + (element_bytes if kind == "budget" else 0) + (8 if wire == "fp8" else 0))
        return (traffic.total - bare.total) / (rows * 16)

    assert [vectors(wire, 4) for wire in (None, *WIRES)] == [16, 8, 2 + 4]
    assert [vectors(wire, 2) for wire in (None, *WIRES)] == [8, 8, 2 + 4]


def test_hierarchical_has_no_such_key():
    with pytest.raises(ConfigError, match="exchange_dtype"):
        compose(["moe/dispatch=hierarchical", "+moe.dispatch.exchange_dtype=fp8"])
    assert compose(["moe/dispatch=padded", "moe.dispatch.exchange_dtype=fp8"]).config.moe.dispatch.wire == Wire("fp8")
