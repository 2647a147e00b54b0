"""Experts that are modules, of unlike kinds and widths, sharded over ranks: n ranks equal one device."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moedist.model.attention.experts.standard import StandardConfig
from moedist.model.attention.mixture import MixtureConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.nn import MoELayer
from moedist.parallel import clip_gradients, spread, spread_as_guest
from tests.nn.test_layer import unlike_experts
from tests.ranks import Here

WORLD, TOKENS, COUNT = 4, 12, 8
DISPATCHES = {"all_to_all": AllToAllConfig(), "padded": PaddedConfig(), "hierarchical": HierarchicalConfig("rank")}
LIMITS = {"dropless": CapacityConfig(factor=None), "dropping": CapacityConfig(factor=1.0, drop_policy="probability")}


def layer_of(dispatch: str, limit: str, top_k: int, idle: int | None = None) -> MoELayer:
    """The same on every rank; without tokens for one expert where ``idle`` says so, and with a frozen one."""
    torch.manual_seed(0)
    experts = unlike_experts(COUNT)
    experts[5].requires_grad_(False)
    router = nn.Linear(6, COUNT, dtype=torch.float64)
    if idle is not None:
        with torch.no_grad():
            router.bias[idle] = -50.0
    return MoELayer(
        experts, router, 6, 5, top_k=top_k, use_aux_loss=True, capacity=LIMITS[limit], dispatch=DISPATCHES[dispatch]
    )


def batch(rank: int, num_tokens: int) -> tuple[Tensor, TokenContext]:
    """Vectors of a rank; ``num_tokens`` of all ranks count."""
    x = torch.randn(TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 + rank))
    valid = torch.arange(TOKENS) < valid_tokens(rank)
    return x.requires_grad_(), TokenContext.of_rows(1, TOKENS, valid_T=valid, num_tokens=torch.tensor(num_tokens))


def valid_tokens(rank: int) -> int:
    return (TOKENS, 0, 5, TOKENS)[rank]


def weighted(out: Tensor) -> Tensor:
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).square().sum()


def one_device(*case: object) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[str, Tensor], float]:
    """Rank by rank on one layer: outputs, input gradients, parameter gradients, balance loss of all tokens."""
    layer = layer_of(*case)
    total = sum(valid_tokens(rank) for rank in range(WORLD))
    xs, outs, masses, counts = [], [], [], []
    for rank in range(WORLD):
        x, ctx = batch(rank, total)
        routing = layer.moe.router(x, ctx)
        masses.append(routing.probs_TE.masked_fill(~ctx.valid_T[:, None], 0).sum(0))
        out = layer(x, ctx)
        counts.append(layer.usage.tokens_E)
        xs.append(x)
        outs.append(out)
    share = sum(counts) / sum(counts).sum()
    aux = COUNT * (share * sum(masses)).sum() / total
    (sum(weighted(out) for out in outs) + 0.3 * aux).backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return dict(enumerate(outs)), {rank: x.grad for rank, x in enumerate(xs)}, grads, aux.item()


def under_fsdp(here: Here, ep: int) -> dict[str, Tensor]:
    """Whole gradients where `spread` cuts every weight."""
    layer = layer_of("all_to_all", "dropping", 2)
    table = spread(layer, here.mesh_of(ep, WORLD))
    x, ctx = batch(here.rank, sum(valid_tokens(rank) for rank in range(WORLD)))
    (weighted(layer(x, ctx)) + 0.3 * layer.aux_loss).backward()
    table.sum_copies(layer)
    with pytest.raises(ValueError, match="cut by FSDP"):
        layer.get_flat_parameters()
    grads = {n: whole(p.grad) for n, p in layer.named_parameters() if p.requires_grad}
    return {**grads, "norm": table.norm(layer)}


@pytest.mark.parametrize("ep", [1, 2])
def test_under_fsdp(ranks, ep: int):
    *_, grads, _ = reference(("all_to_all", "dropping", 2, None))
    norm = sum(grad.square().sum() for grad in grads.values()).sqrt()
    seen = set()
    for found in ranks(WORLD).run(under_fsdp, ep):
        torch.testing.assert_close(found.pop("norm"), norm)
        for name, grad in found.items():
            torch.testing.assert_close(grad, grads[name], atol=1e-12, rtol=1e-12, msg=name)
        seen |= set(found)
    assert seen == set(grads)


def on_ranks(here: Here, ep: int, cases: list[tuple]) -> list[dict]:
    """Each case on this rank: `spread`, forward, backward, sums; what came of it."""
    mesh, found = here.mesh_of(ep), []
    for case in cases:
        layer = layer_of(*case)
        flat, count = layer.get_flat_parameters(), layer.num_parameters()
        table = spread(layer, mesh)
        total = sum(valid_tokens(rank) for rank in range(WORLD))
        x, ctx = batch(here.rank, total)
        out = layer(x, ctx)
        aux = layer.aux_loss
        (weighted(out) + 0.3 * aux).backward()
        table.sum_copies(layer)
        aux = aux.detach().clone()
        dist.all_reduce(aux)
        same = torch.equal(layer.get_flat_parameters(), flat) and layer.num_parameters() == count
        layer.set_flat_parameters(flat * 2)
        found.append(
            {
                "out": out.detach(),
                "x": x.grad,
                "grads": {n: p.grad for n, p in layer.named_parameters() if p.requires_grad},
                "aux": aux.item(),
                "norm": table.norm(layer).item(),
                "flat": same and torch.equal(layer.get_flat_parameters(), flat * 2),
                "local": (layer.num_local_experts, layer.num_parameters(local=True) < count),
                "diagnostics": layer.get_auxiliary_loss_diagnostics(),
            }
        )
    return found


CASES = [
    *((dispatch, limit, 2, None) for dispatch, limit in itertools.product(DISPATCHES, LIMITS)),
    ("all_to_all", "dropless", 1, 3),
    ("all_to_all", "dropless", 0, None),
    ("padded", "dropping", 1, 3),
]


@functools.cache
def reference(case: tuple) -> tuple:
    return one_device(*case)


@pytest.mark.requirement("R1-16", "R1-35", "R1-40", "R1-15")
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_R1_40_ranks_equal_one_device(ranks, ep: int):
    """Outputs, every gradient, balance loss, norm, flat vector, counts and diagnostics; ranks without tokens, experts
    without any, a frozen expert on one rank alone."""
    results = ranks(WORLD).run(on_ranks, ep, CASES)
    for place, case in enumerate(CASES):
        outs, xs, grads, aux = reference(case)
        seen, norm = set(), sum(grad.square().sum() for grad in grads.values()).sqrt().item()
        for rank, result in enumerate(found[place] for found in results):
            close = functools.partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
            close(result["out"], outs[rank].detach(), msg=f"{case} out {rank}")
            close(result["x"], xs[rank], msg=f"{case} x {rank}")
            for name, grad in result["grads"].items():
                close(grad, grads[name], msg=f"{case} {name}")
            seen |= set(result["grads"])
            assert result["aux"] == pytest.approx(aux, abs=1e-12) and result["norm"] == pytest.approx(norm)
            assert result["flat"] and result["local"] == (COUNT // ep, ep > 1)
            assert result["diagnostics"] == results[0][place]["diagnostics"]
            assert result["diagnostics"]["load_balance_loss"] == pytest.approx(aux, abs=1e-12)
        assert seen == set(grads), "a parameter lives nowhere"
        tokens = [results[0][place]["diagnostics"][f"expert_{e}_tokens"] for e in range(COUNT)]
        if case[2] > 0:
            assert sum(tokens) == case[2] * sum(valid_tokens(rank) for rank in range(WORLD))
        if case[3] is not None:
            assert tokens[case[3]] == 0


def as_guest(here: Here, ep: int, wrapper: str) -> tuple[dict[str, Tensor], float]:
    """Two accumulated backward passes, where ranks call unlike experts."""
    layer = layer_of("all_to_all", "dropless", 1)
    model = nn.Sequential(layer, nn.Linear(5, 2, dtype=torch.float64))
    experts = spread_as_guest(model, here.mesh_of(ep))
    assert all(".bank.experts." in name for name in experts)
    wrapped = model
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=here.mesh_of(1).device_mesh["replicate"], ignored_params=set(experts.values()))
    for step in range(2):
        out = wrapped(guest_batch(here.rank, step))
        (weighted(out) + layer.aux_loss).backward()
    norm = clip_gradients(model, max_norm=1e-3).item()
    return {name: whole(p.grad) / 1e-3 * norm for name, p in model.named_parameters() if p.requires_grad}, norm


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def attention_as_guest(here: Here) -> tuple[bool, int]:
    """Whether a mixture's experts are left whole to the wrapper, and how many ranks the layer beside it spans."""
    mixture = MixtureConfig(num_heads=2, experts=(StandardConfig(),) * 4).build_mixture(8)
    model = nn.ModuleList([mixture, layer_of("all_to_all", "dropless", 2)])
    experts = spread_as_guest(model, here.mesh_of(4))
    assert not any(name.startswith("0.") for name in experts)
    return mixture.bank.sharded, model[1].num_local_experts


def test_attention_experts_stay_whole_in_somebodys_loop(ranks):
    assert ranks(WORLD).run(attention_as_guest) == [(False, 2)] * WORLD


def guest_batch(rank: int, step: int) -> Tensor:
    """Few tokens: most experts are idle on most ranks."""
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))


def guest_on_one_device() -> dict[str, Tensor]:
    layer = layer_of("all_to_all", "dropless", 1)
    model = nn.Sequential(layer, nn.Linear(5, 2, dtype=torch.float64))
    for step in range(2):
        layer.train()
        together = torch.cat([guest_batch(rank, step) for rank in range(WORLD)])
        outs = model(together).split(3)
        (sum(weighted(out) for out in outs) / WORLD + layer.aux_loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("ep", "wrapper"), [(1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp2")])
def test_guest_of_ddp_and_fsdp2(ranks, ep: int, wrapper: str):
    """Mean over ranks, accumulation, whole-model norm and clip, whatever order gradients arrive in."""
    expected = guest_on_one_device()
    whole = sum(grad.square().sum() for grad in expected.values()).sqrt().item()
    seen = set()
    for grads, norm in ranks(WORLD).run(as_guest, ep, wrapper):
        assert norm == pytest.approx(whole, rel=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], atol=1e-12, rtol=1e-9, msg=name)
        seen |= set(grads)
    assert seen == set(expected)


def mostly_frozen() -> MoELayer:
    """Trained are the experts from number 2 on: at EP 4 the first rank trains nothing."""
    layer = layer_of("all_to_all", "dropless", 2)
    layer.moe.router.requires_grad_(False)
    for number in ("0", "1"):
        layer.moe.bank.experts.expert[number].requires_grad_(False)
    layer.use_aux_loss = False
    return layer


def train_mostly_frozen(here: Here) -> tuple[dict[str, Tensor], float]:
    """Gradients, and the norm of the whole model."""
    layer = mostly_frozen()
    table = spread(layer, here.mesh_of(4))
    weighted(layer(guest_batch(here.rank, 0))).backward()
    table.sum_copies(layer)
    return {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}, table.norm(layer).item()


def test_a_rank_may_have_nothing_to_train(ranks):
    """Its part in the exchange of gradients, and in the norm, is asked for all the same."""
    layer = mostly_frozen()
    sum(weighted(layer(guest_batch(rank, 0))) for rank in range(WORLD)).backward()
    expected = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    norm = sum(grad.square().sum() for grad in expected.values()).sqrt().item()
    results = ranks(WORLD).run(train_mostly_frozen)
    assert results[0][0] == {}
    for grads, found in results:
        assert found == pytest.approx(norm)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], atol=1e-12, rtol=1e-12, msg=name)


def saved_and_loaded(here: Here, folder: str) -> list[bool]:
    """Written at EP 2, read at EP 4 and 1: whether the whole vector is the same."""
    layer = layer_of("all_to_all", "dropless", 2)
    flat = layer.get_flat_parameters()
    spread(layer, here.mesh_of(2))
    dcp.save(layer.state_dict(), checkpoint_id=folder)
    same = []
    for ep in (4, 1):
        other = layer_of("all_to_all", "dropless", 2)
        other.set_flat_parameters(torch.zeros_like(flat))
        spread(other, here.mesh_of(ep))
        dcp.load(other.state_dict(), checkpoint_id=folder)
        same.append(torch.equal(other.get_flat_parameters(), flat))
    return same


def test_checkpoints_know_experts_by_global_id(ranks, tmp_path):
    for same in ranks(WORLD).run(saved_and_loaded, str(tmp_path / "checkpoint")):
        assert same == [True, True]
