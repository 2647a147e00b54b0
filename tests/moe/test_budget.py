"""Blocks of a fixed size: rows drawn by hand, what is left behind, and that nobody asks the host."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moedist.config import ConfigError
from moedist.mesh import Axis
from moedist.moe import token_choice
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch import rows
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.budget import BudgetConfig
from moedist.moe.dispatch.traffic import Batch
from moedist.moe.experts import grouped
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.modules import ModuleExperts
from moedist.moe.placement import Placement
from moedist.moe.router.hash import HashConfig
from moedist.nn import MoELayer
from tests.moe.by_hand import dropless, routing_of
from tests.moe.test_dispatch import UNEQUAL, hand_plan, tokens
from tests.moe.test_experts import filled
from tests.moe.test_parity import ROUTERS_OF_THE_FIELD
from tests.parity import HIDDEN, NUM_EXPERTS, SCENES, compare, counted_bytes, many_ranks, one_device
from tests.ranks import Here

TIGHT = BudgetConfig(1.0)


def by_hand(here: Here, may_spill: bool) -> dict[str, Any]:
    """Experts 0 1 | 2 3 on two ranks; of each rank's pairs 4 go to the first and 2 to the second: 0 1, 0 2 | 1 3."""
    placement = Placement.in_order(4, 2)
    plan = dataclasses.replace(hand_plan(), may_spill=may_spill)
    dispatcher = TIGHT.build(placement, here.mesh_of(2).ep)
    with counted_bytes() as sent:
        arrived = dispatcher.dispatch(tokens(4, here.rank) + 1, plan)
    home = dispatcher.combine(arrived.rows.x_RD, arrived.ticket)
    rows = arrived.rows
    return {
        "rows": rows.x_RD[:, 0].tolist(),
        "gates": rows.gate_R.tolist(),
        "sizes": rows.sizes,
        "ends": rows.ends_e.tolist(),
        "home": home[:, 0].tolist(),
        "sent": sent,
        "spilled": int(TIGHT.spilled(plan, placement)),
    }


def test_rows_by_hand(ranks):
    """Blocks of 4 of a rank's 8 pairs: they hold all."""
    first, second = ranks(2).run(by_hand, True)
    assert first["rows"] == [1, 2, 101, 102] + [1, 3, 101, 103] and first["ends"] == [4, 8]
    assert second["rows"] == [2, 4, 102, 104] + [0] * 4 and second["ends"] == [4, 4]
    assert second["gates"] == [0.2, 0.6, 0.2, 0.6] + [0] * 4
    assert first["home"] == [2, 4, 3, 4] and second["home"] == [202, 204, 103, 104]
    assert first["sizes"] is None and first["spilled"] == 0
    assert first["sent"] == second["sent"] == [4 * 3 * 8], "one exchange: vector, gate, and the place of the expert"


def plan_of_one_rank():
    """8 pairs of 4 tokens, 6 of them for experts 0 and 1."""
    plan = dropless(routing_of([[0, 1], [0, 2], [0, 1], [3, 1]], 4), TokenContext.of_rows(1, 4))
    return dataclasses.replace(plan, may_spill=True)


def spilling(here: Here) -> tuple[int, list[float], list[int], list[float]]:
    placement, plan = Placement.in_order(4, 2), plan_of_one_rank()
    dispatcher = TIGHT.build(placement, here.mesh_of(2).ep)
    arrived = dispatcher.dispatch(tokens(4, here.rank) + 1, plan)
    free = dispatcher.dispatch(tokens(4, here.rank) + 1, dataclasses.replace(plan, may_spill=False))
    home = dispatcher.combine(free.rows.x_RD, free.ticket)
    rows = arrived.rows
    return int(TIGHT.spilled(plan, placement)), rows.x_RD[:, 0].tolist(), rows.ends_e.tolist(), home[:, 0].tolist()


def test_what_is_left_behind_is_counted_and_only_where_it_may_be(ranks):
    (spilled, rows, ends, home), second = ranks(2).run(spilling)
    # expert 0: tokens 0 1 2, expert 1: 0 2 3, of which the last two find the block of 4 full
    assert spilled == 2 and rows == [1, 2, 3, 101, 102, 103, 1, 101] and ends == [6, 8]
    assert second[0] == 2 and second[1] == [2, 102, 4, 104, 0, 0, 0, 0] and second[2] == [2, 4]
    assert home == [2, 4, 6, 8], "without leave nothing is left behind"


@pytest.mark.parametrize(
    ("factor", "num_pairs", "num_ranks", "most", "block"),
    [(1.0, 8, 2, None, 4), (1.5, 7, 2, None, 6), (4.0, 8, 4, None, 8), (9.0, 8, 4, None, 8), (1.5, 64, 4, 20, 20)]
    + [(1.1, 100, 10, None, 11), (1.5, 0, 4, None, 0)],
)
def test_size_of_a_block(factor: float, num_pairs: int, num_ranks: int, most: int | None, block: int):
    assert BudgetConfig(factor).block(num_pairs, num_ranks, most) == block


def test_one_rank_has_room_for_all():
    plan, placement = plan_of_one_rank(), Placement.in_order(4, 1)
    rows = TIGHT.build(placement, Axis("ep")).dispatch(tokens(4), plan).rows
    assert int(TIGHT.spilled(plan, placement)) == 0
    assert rows.x_RD[:, 0].tolist() == [0, 1, 2, 0, 2, 3, 1, 3] and rows.ends_e.tolist() == [3, 6, 7, 8]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="leaves no room for the even share"):
        BudgetConfig(0.9)
    with pytest.raises(ConfigError, match=r"not \(2, 1, 0, 3\). Set moe.dispatch.kind to all_to_all"):
        TIGHT.build(UNEQUAL, Axis("ep", 4, 0))
    layer = MoELayer([torch.nn.Linear(8, 8)], HashConfig(), 8, dispatch=BudgetConfig())
    with pytest.raises(ValueError, match="needs a caller who reads"):
        layer(torch.zeros(4, 8), TokenContext.of_rows(1, 4, may_spill=True))
    assert layer(torch.zeros(4, 8)).shape == (4, 8) and not layer.supports_compile


def test_traffic():
    batch = Batch(tokens=64, dim=16, num_experts=8, experts_per_token=2, capacity=None, ep=4, nodes=2)
    assert BudgetConfig(1.5).room(batch) == 4 * 48
    row = 4 * 16 * 2 + 2 * 4 + 2
    assert dataclasses.astuple(BudgetConfig(1.5).traffic(batch)) == (48 * row, 2 * 48 * row)
    assert BudgetConfig(4.0).room(dataclasses.replace(batch, capacity=20)) == 4 * 40


def cases_hold(here: Here, ep: int) -> float:
    """Every router, with and without a limit, in blocks that hold whatever comes, against one device."""
    mesh, worst = here.mesh_of(ep), 0.0
    for turn, (name, router) in enumerate(ROUTERS_OF_THE_FIELD.items()):
        factor = 1.0 if turn % 2 and name != "expert choice" else None
        experts = (LoopConfig, GroupedConfig)[turn // 2 % 2](hidden_dim=HIDDEN, bias=True)
        config = MoEConfig(
            num_experts=NUM_EXPERTS,
            router=router,
            capacity=CapacityConfig(factor=factor),
            dispatch=BudgetConfig(float(ep)),
            experts=experts,
        )
        scene = SCENES[turn % 2]
        worst = max(worst, compare(many_ranks(config, scene, mesh), one_device(config, scene, here.world)))
    return worst


@pytest.mark.parametrize("ep", [*(pytest.param(ep, marks=pytest.mark.slow) for ep in (1, 2)), 4])
def test_ranks_equal_one_device(ranks, ep: int):
    assert max(ranks(4).run(cases_hold, ep)) <= 1e-12


# Sizes that only the device knows


def experts_of(kind: str, dtype: torch.dtype) -> Any:
    if kind == "modules":
        torch.manual_seed(0)
        return ModuleExperts([torch.nn.Linear(16, 16, dtype=dtype) for _ in range(4)], 16)
    config = LoopConfig if kind == "loop" else GroupedConfig
    # Without biases fp64 runs as `moedist.moe.host_experts`; with them fp32 as grouped products.
    return filled(config(hidden_dim=24, bias=dtype == torch.float32), 16, 4, dtype)


@pytest.mark.parametrize("sizes", [(3, 0, 5, 2), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["loop", "grouped", "modules"])
def test_rows_behind_the_last_may_hold_anything(kind: str, dtype: torch.dtype, sizes: tuple[int, ...]):
    """They are poisoned, outputs' gradients too; nothing of it reaches a row or a weight."""
    results = []
    for num_empty in (0, 6):
        experts, num_rows = experts_of(kind, dtype), sum(sizes)
        generator = torch.Generator().manual_seed(0)
        used, gates = (torch.randn(num_rows, *shape, generator=generator).to(dtype) for shape in ((16,), ()))
        poison = torch.full((num_empty, 16), torch.nan, dtype=dtype)
        x_RD, gate_R = torch.cat([used, poison]), torch.cat([gates, poison[:, 0]])
        ends_e = torch.tensor(sizes).cumsum(0).to(torch.int32)
        rows = Rows(x_RD.requires_grad_(), gate_R.requires_grad_(), None if num_empty else sizes, ends_e)
        assert rows.read_sizes() == sizes
        y_RD = experts(rows)
        assert y_RD.shape == x_RD.shape
        y_RD.backward(torch.cat([torch.linspace(-1, 1, used.numel()).view_as(used).to(dtype), poison]))
        found = {name: parameter.grad for name, parameter in experts.named_parameters()}
        found |= {"y": y_RD.detach(), "x": x_RD.grad, "gate": gate_R.grad}
        given = ("y", "x", "gate")
        results.append({n: v[:num_rows] if n in given else v for n, v in found.items() if v is not None})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def asked_of(config: MoEConfig, may_spill: bool) -> None:
    """A pass and its gradient, rank 0 of 2, of tensors without values: nothing travels."""
    with FakeTensorMode():
        layer = config.build(16)
        layer.spread(Placement.in_order(4, 2), Axis("ep", 2, 0, "nobody's"), Axis("dp"))
        x_TD = torch.randn(24, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x_TD, TokenContext.of_rows(3, 8, may_spill=may_spill))
        loss = output.out_TD.sum() + sum(output.report.losses.values())
        if output.report.spilled is not None:
            loss = loss * torch.ones(()).masked_fill(output.report.spilled > 0, torch.nan)
        loss.backward()
        assert x_TD.grad.shape == (24, 16)


@pytest.mark.parametrize("factor", [1.25, None])
def test_the_host_is_not_asked(factor: float | None):
    """Fake tensors have no values to read; without leave to spill sizes are, which shows that the test can fail."""
    config = MoEConfig(
        num_experts=4,
        capacity=CapacityConfig(factor=factor),
        dispatch=BudgetConfig(),
        experts=GroupedConfig(hidden_dim=32, bias=True),
    )
    asked_of(config, may_spill=True)
    for other, may_spill in ((config, False), (dataclasses.replace(config, experts=LoopConfig()), True)):
        with pytest.raises(DataDependentOutputException):
            asked_of(other, may_spill)


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__")


def asking(here: Here) -> dict[str, list[str]]:
    """What is read of tensors in a pass and its gradient at EP 2, with values, as if they lay on a device."""
    mesh, reads, found = here.mesh_of(2), [], {}

    def noted(name: str) -> Any:
        real = getattr(Tensor, name)

        def reading(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return real(self, *args, **kwargs)

        return mock.patch.object(Tensor, name, reading)

    for dispatch in (BudgetConfig(), AllToAllConfig()):
        config = MoEConfig(num_experts=4, capacity=CapacityConfig(factor=None), dispatch=dispatch)
        layer = dataclasses.replace(config, experts=GroupedConfig(hidden_dim=32)).build(16)
        layer.spread(Placement.in_order(4, 2), mesh.ep, mesh.dp)
        x_TD = torch.randn(24, 16, generator=torch.Generator().manual_seed(here.rank)).requires_grad_()
        reads.clear()
        with contextlib.ExitStack() as stack:
            for module in (rows, token_choice, grouped):
                stack.enter_context(mock.patch.object(module, "on_host", lambda x: False))
            for name in READS:
                stack.enter_context(noted(name))
            layer(x_TD, TokenContext.of_rows(3, 8, may_spill=True)).out_TD.sum().backward()
        found[dispatch.kind] = list(reads)
    return found


def test_nothing_is_read_from_a_tensor(ranks):
    assert ranks(2).run(asking) == [{"budget": [], "all_to_all": ["tolist"]}] * 2


def test_the_layer_is_one_graph():
    """In bf16; torch's rule of shapes for grouped_mm knows no other type."""
    torch._dynamo.reset()
    config = MoEConfig(
        num_experts=4,
        capacity=CapacityConfig(factor=None),
        dispatch=BudgetConfig(),
        experts=GroupedConfig(hidden_dim=32),
    )
    layer = config.build(16)
    ctx = TokenContext.of_rows(3, 8, may_spill=True)
    results = []
    for each in (torch.compile(layer, fullgraph=True, backend="eager"), layer):
        layer.zero_grad()
        x_TD = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = each(x_TD, ctx)
        (output.out_TD.sum() + sum(output.report.losses.values())).backward()
        results.append([output.out_TD, output.report.spilled, x_TD.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
