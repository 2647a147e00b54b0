"""MoE layers in a loop of somebody else's: under DDP the gradients of n ranks are those of one device."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moedist.config import ConfigError
from moedist.mesh import Mesh, adopt_mesh
from moedist.mesh.collectives import all_gather
from moedist.mesh.mesh import grid
from moedist.moe import CapacityConfig, MoEConfig, TokenContext, pack_reports
from moedist.moe.balance.switch import SwitchConfig
from moedist.parallel import clip_gradients, spread_as_guest
from tests.ranks import Here

DIM, WORLD, LENGTH = 8, 4, 6
CONFIG = MoEConfig(
    num_experts=8,
    capacity=CapacityConfig(factor=1.0),
    balance={"switch": SwitchConfig(0.1, scope="micro_batch")},
)


class Net(nn.Module):
    """Somebody's model: a layer of theirs, a MoE layer, a layer of theirs."""

    def __init__(self, config: MoEConfig = CONFIG):
        super().__init__()
        self.first, self.moe, self.last = nn.Linear(DIM, DIM), config.build(DIM), nn.Linear(DIM, 1)

    def forward(self, x_BSD: Tensor, num_tokens: Tensor | None) -> tuple[Tensor, Any]:
        ctx = TokenContext.of_rows(*x_BSD.shape[:2], num_tokens=num_tokens)
        output = self.moe(self.first(x_BSD).flatten(0, 1), ctx)
        return self.last(output.out_TD), output.report


def make(idle: bool = False) -> Net:
    """The same on every rank; ``idle``: every token prefers expert 5, so that the others of a rank get few or none."""
    torch.manual_seed(0)
    net = Net().double()
    if idle:
        with torch.no_grad():
            net.first.weight.zero_(), net.first.bias.fill_(1.0)
            net.moe.router.weight.copy_(torch.linspace(0, 0.1, 8)[:, None].expand(8, DIM).roll(6, 0))
    return net


def rows_of(rank: int, step: int = 0) -> Tensor:
    """Ranks have 3, 0, 1 and 4 rows: one of them is empty."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn((3, 0, 1, 4)[rank], LENGTH, DIM, dtype=torch.float64, generator=generator)


NUM_TOKENS = torch.tensor(8 * LENGTH)


def share(net: nn.Module, rank: int, step: int = 0) -> Tensor:
    """A rank's share of the one global loss."""
    out_T1, report = net(rows_of(rank, step), NUM_TOKENS)
    return (out_T1 - 1).square().sum() / NUM_TOKENS + pack_reports([report]).objective()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_device(idle: bool, steps: int = 1) -> dict[str, Tensor]:
    net = make(idle)
    for step in range(steps):
        for rank in range(WORLD):
            share(net, rank, step).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def under_ddp(here: Here, idle: bool, waits: bool) -> dict[int, dict[str, Tensor]]:
    """Whole gradients by EP size after two micro-steps; ``waits``: DDP reduces after the last of them only."""
    found = {}
    for ep in (1, 2, 4):
        net = make(idle)
        spread_as_guest(net, adopt_mesh(ep, "cpu"))
        ddp = DistributedDataParallel(net)
        for step in range(2):
            with ddp.no_sync() if waits and step == 0 else contextlib.nullcontext():
                (WORLD * share(ddp, here.rank, step)).backward()
        found[ep] = {name: whole(parameter.grad) for name, parameter in net.named_parameters()}
    return found


@pytest.mark.pitfall("1", "3", "4", "5")
@pytest.mark.parametrize("idle", [False, True])
def test_gradients_under_ddp_are_those_of_one_device(ranks, idle):
    """Pitfalls 1, 3 and 4 (and 5): experts without a divisor too many, the router's among them, a rank without rows,
    experts without tokens; accumulated with and without ``no_sync``."""
    reference = one_device(idle, steps=2)
    busy = {expert for expert in range(8) if reference["moe.bank.experts.up"][expert].any()}
    assert len(busy) == 8 or idle and 5 in busy and len(busy) < 8
    for waits in (False, True):
        for found in ranks(WORLD).run(under_ddp, idle, waits):
            for ep, grads in found.items():
                for name, grad in grads.items():
                    assert grad is not None, f"{name} at ep {ep}"
                    difference = (grad - reference[name]).abs().max().item()
                    assert difference <= 1e-12, f"{name} at ep {ep} differs by {difference:.1e}"


def trained(here: Here) -> dict[int, Any]:
    """By EP size: norms of three clipped steps, whole parameters, names of those that differ between replicas."""
    found = {}
    for ep in (1, 2, 4):
        mesh = adopt_mesh(ep, "cpu")
        net = make()
        experts = spread_as_guest(net, mesh)
        ddp = DistributedDataParallel(net)
        dense = [parameter for name, parameter in net.named_parameters() if name not in experts]
        # foreach: what a GPU takes by default, and what refuses plain tensors and DTensors in one group
        groups = [{"params": dense}, {"params": list(experts.values())}]
        optimizer = torch.optim.SGD(groups, lr=0.5, foreach=True)
        norms = []
        for step in range(3):
            (WORLD * share(ddp, here.rank, step)).backward()
            norms.append(clip_gradients(net, 0.05).item())
            optimizer.step()
            optimizer.zero_grad()
        apart = []
        for name, parameter in net.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            copies = all_gather(local.detach(), mesh.edp if name in experts else mesh.dp)
            apart += [] if (copies == copies[0]).all() else [name]
        found[ep] = norms, {name: whole(parameter).detach() for name, parameter in net.named_parameters()}, apart
    return found


@pytest.mark.pitfall("2", "3", "6")
def test_replicas_stay_bit_equal_under_ddp(ranks):
    """Pitfalls 2, 3 and 6: one norm on all ranks and at every EP; after clipped steps all replicas are bit-equal."""
    results = ranks(WORLD).run(trained)
    norms_1, weights_1, _ = results[0][1]
    assert all(norm > 0.05 for norm in norms_1), "the clip must act"
    for found in results:
        for ep, (norms, weights, apart) in found.items():
            assert apart == [] and norms == results[0][ep][0]
            assert norms == pytest.approx(norms_1, rel=1e-12)
            for name, weight in weights.items():
                torch.testing.assert_close(weight, weights_1[name], atol=1e-12, rtol=0)


def test_clip_on_one_process_is_torchs():
    net = make()
    share(net, 0).backward()
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in net.parameters()])
    assert clip_gradients(net, None).item() == pytest.approx(expected.item(), rel=1e-12)
    assert clip_gradients(net, 0.01).item() == pytest.approx(expected.item(), rel=1e-12)
    assert clip_gradients(net, None).item() == pytest.approx(0.01, rel=1e-12)
    bf16 = nn.Linear(3, 2).bfloat16()
    bf16(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert (
        clip_gradients(bf16, 1.0).item() == pytest.approx(8**0.5, rel=1e-2) and bf16.bias.grad.dtype == torch.bfloat16
    )


def refusals(here: Here) -> dict[str, str]:
    """What each mistake is answered with, on every rank and before anything is changed."""
    said = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except (ConfigError, ValueError) as error:
            said[name] = str(error)

    mesh = adopt_mesh(2, "cpu")
    attempt("ep 3", lambda: adopt_mesh(3, "cpu"))
    attempt("experts", lambda: spread_as_guest(Net(MoEConfig(num_experts=5)), mesh))
    attempt("none", lambda: spread_as_guest(nn.Linear(2, 2), mesh))
    net = Net()
    attempt("fsdp", lambda: spread_as_guest(net, grid(WORLD, 2, torch.device("cpu"), fsdp=4)))
    attempt("wrapped", lambda: spread_as_guest(DistributedDataParallel(net), mesh))
    spread_as_guest(net, mesh)
    attempt("twice", lambda: spread_as_guest(net, mesh))
    return said


def test_mistakes_are_named(ranks):
    (said, *others) = ranks(WORLD).run(refusals)
    assert all(other == said for other in others)
    assert "ep = 3 does not divide the 4 ranks launched" in said["ep 3"]
    assert "num_experts = 5 cannot be cut into 2 equal parts" in said["experts"]
    assert "a mesh with fsdp cuts every weight" in said["fsdp"]
    assert "Linear holds no MoE layer" in said["none"]
    assert "wrapped already (DistributedDataParallel)" in said["wrapped"] and "wrap then" in said["wrapped"]
    assert "moe is spread already" in said["twice"]


def test_a_mesh_needs_ranks():
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match=r"mesh.ep = 2 needs the ranks of a process group.*init_process_group"):
        adopt_mesh(2, "cpu")


def test_alone_nothing_is_averaged():
    net, reference = make(), one_device(False)
    spread_as_guest(net, Mesh.alone())
    for rank in range(WORLD):
        share(net, rank).backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, reference[name])


def timeouts(here: Here) -> list[float]:
    mesh = adopt_mesh(2, "cpu")
    return [
        axis.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for axis in (mesh.dp, mesh.ep, mesh.edp)
    ]


@pytest.mark.pitfall("37")
def test_adopted_groups_wait_as_long_as_the_callers(ranks):
    """Pitfall 37: the pool's own group waits 60 s."""
    assert ranks(WORLD).run(timeouts) == [[60.0] * 3] * WORLD
