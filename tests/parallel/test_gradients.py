"""The gradient table: sums without divisors, one norm for the whole model, replicas that stay equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moedist.engine.contract import TrainingStep
from moedist.engine.native import NativeConfig
from moedist.mesh import Axis, Mesh
from moedist.mesh.collectives import all_gather, all_sum
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.init import fill_whole
from moedist.moe.layer import MoEConfig
from moedist.parallel import gradients as module
from moedist.parallel import spread
from tests.ranks import Here

# No width that 2 or 4 divides: pieces of unlike sizes where weights are cut.
DIM = 7
CONFIG = MoEConfig(
    num_experts=4, capacity=CapacityConfig(factor=1.0), experts=LoopConfig(hidden_dim=9), shared_hidden_dim=5
)
LAYOUTS = [(1, None), (2, None), (4, None), (1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 4)]


def local(value):
    return value.to_local() if hasattr(value, "to_local") else value


def layer_and_table(mesh: Mesh):
    layer = CONFIG.build(DIM, dtype=torch.float64)
    return layer, spread(layer, mesh)


def known_norm(here: Here, ep: int, fsdp: int | None, idle: bool) -> list[float]:
    """Norms of a replicated gradient of 2.0 and an expert's of 4.0, before and after a scale by 0.5."""
    layer, table = layer_and_table(here.mesh_of(ep, fsdp))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def put(parameter: torch.Tensor, place: tuple[int, ...], value: float) -> None:
        whole = torch.zeros(parameter.shape, dtype=parameter.dtype)
        whole[place] = value
        fill_whole(parameter.grad, whole)

    put(layer.router.weight, (0, 0), 2.0)
    if not idle:
        put(layer.bank.experts.up, (3, 1, 1), 4.0)
    first = table.norm(layer).item()
    table.scale(layer, 0.5)
    return [first, table.norm(layer).item()]


@pytest.mark.parametrize(("ep", "fsdp"), LAYOUTS)
def test_norm_of_known_gradients(ranks, ep, fsdp):
    """G07, gate P8: on every rank, at every layout, also where a rank's experts had no tokens."""
    for norm, halved in ranks(4).run(known_norm, ep, fsdp, False):
        assert norm == pytest.approx(4.47213595, abs=1e-8) and halved == pytest.approx(norm / 2, abs=1e-12)
    for norm, _ in ranks(4).run(known_norm, ep, fsdp, True):
        assert norm == 2.0


def summed(here: Here, ep: int, bucket_bytes: int) -> list[str]:
    """Names of parameters whose sum over copies is wrong, where rank r's gradient is r + 1."""
    mesh = here.mesh_of(ep)
    layer, table = layer_and_table(mesh)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, float(here.rank + 1))
    module.BUCKET_BYTES, before = bucket_bytes, module.BUCKET_BYTES
    try:
        table.sum_copies(layer)
    finally:
        module.BUCKET_BYTES = before
    holders = [rank for rank in range(4) if rank % ep == here.rank % ep]
    wrong = []
    for name, parameter in layer.named_parameters():
        expected = sum(rank + 1 for rank in (holders if "bank.experts" in name else range(4)))
        wrong += [] if (local(parameter.grad) == expected).all() else [name]
    return wrong


@pytest.mark.pitfall("1")
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 400, 32 * 2**20])
def test_sums_over_copies_without_a_divisor(ranks, ep, bucket_bytes):
    """Pitfall 1."""
    assert ranks(4).run(summed, ep, bucket_bytes) == [[]] * 4


def trained(here: Here, ep: int, fsdp: int | None) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """Three clipped steps of plain SGD: norms, whole parameters, and names of those that differ between replicas."""
    mesh = here.mesh_of(ep, fsdp)
    layer, table = layer_and_table(mesh)
    training_step = TrainingStep(micro_batch=1, accumulation=1, precision="fp64", clip_norm=0.05)
    engine = NativeConfig().build(layer, mesh, torch.optim.SGD(layer.parameters(), lr=0.5), table, training_step)
    norms = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + here.rank)
        x_TD = torch.randn(12, DIM, dtype=torch.float64, generator=generator)
        ctx = TokenContext.of_rows(
            2, 6, valid_T=torch.arange(12) < (12, 0, 5, 1)[here.rank], num_tokens=torch.tensor(18), step=step
        )
        output = layer(x_TD, ctx)
        loss = (output.out_TD[ctx.valid_T] - 1).square().sum() / 18
        report = output.report
        engine.backward(loss + sum(report.coefficients[n] * v for n, v in report.losses.items()), last=True)
        norms.append(engine.step())
    apart = []
    for name, parameter in layer.named_parameters():
        copies = all_gather(local(parameter).detach(), table.spread_of[name].copies)
        apart += [] if (copies == copies[0]).all() else [name]
    whole = {
        n: p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for n, p in layer.named_parameters()
    }
    return norms, whole, apart


@pytest.mark.pitfall("1", "2", "3", "6")
def test_replicas_stay_bit_equal_and_norms_agree(ranks):
    """Pitfalls 1, 2, 3 and 6: after clipped steps all replicas are bit-equal, and the model is that of EP = 1."""
    results = {layout: ranks(4).run(trained, *layout) for layout in LAYOUTS}
    reference_norms, reference, _ = results[1, None][0]
    start = dict(CONFIG.build(DIM, dtype=torch.float64).named_parameters())
    assert all(norm > 0.05 for norm in reference_norms), "the clip must act"
    assert all(not torch.equal(start[name], value) for name, value in reference.items()), "every parameter must move"
    for of_ranks in results.values():
        for norms, whole, apart in of_ranks:
            assert apart == []
            assert norms == of_ranks[0][0], "the same number on every rank"
            assert norms == pytest.approx(reference_norms, rel=1e-13)
            for name, value in whole.items():
                torch.testing.assert_close(value, reference[name], atol=1e-13, rtol=0)


def test_roles_and_axes():
    layer = CONFIG.build(DIM)
    model = nn.ModuleDict({"moe": layer, "head": nn.Linear(DIM, 3)})
    model["head"].bias.requires_grad_(False)
    mesh = Mesh.alone()
    table = spread(model, mesh)
    roles = {name: spread.role for name, spread in table.spread_of.items()}
    assert roles == {
        "moe.router.weight": "router",
        "moe.bank.experts.up": "experts",
        "moe.bank.experts.gate": "experts",
        "moe.bank.experts.down": "experts",
        "moe.shared.expert.up": "other",
        "moe.shared.expert.gate": "other",
        "moe.shared.expert.down": "other",
        "head.weight": "other",
    }
    assert table.spread_of["moe.bank.experts.up"].copies == mesh.edp
    assert table.spread_of["moe.bank.experts.up"].pieces == mesh.ep
    assert table.spread_of["head.weight"].copies == mesh.dp and table.spread_of["head.weight"].pieces is None


def test_on_one_process_the_norm_is_torchs():
    model = nn.Linear(3, 2)
    table = spread(model, Mesh.alone())
    model(torch.ones(4, 3)).square().sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    table.sum_copies(model)
    assert table.norm(model).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_parameter_without_a_gradient_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    table = spread(model, Mesh.alone())
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(AssertionError, match="unused.weight took no part in the loss"):
        table.norm(model)


def sharded(here: Here) -> list[str]:
    """What the experts' weights are after spreading over four ranks, and a sum that shows whose they are."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = here.mesh_of(4)
    layer, _ = layer_and_table(mesh)
    whole = CONFIG.build(DIM, dtype=torch.float64).bank.experts
    wrong = []
    for name, parameter in layer.bank.experts.named_parameters():
        right = isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
        right = right and parameter.shape == whole.get_parameter(name).shape and parameter.requires_grad
        right = right and torch.equal(parameter.to_local(), whole.get_parameter(name)[[here.rank]])
        right = right and torch.equal(parameter.full_tensor(), whole.get_parameter(name))
        wrong += [] if right else [name]
    assert all_sum(torch.ones(1), Axis("alone")).item() == 1
    return wrong


def test_experts_are_sharded_by_global_id(ranks):
    assert ranks(4).run(sharded) == [[]] * 4
