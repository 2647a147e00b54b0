"""Shards the experts of a model and says how every parameter lies."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from moedist.mesh import Mesh
from moedist.model.attention.bank import ONE_PASS, Passes
from moedist.model.attention.mixture import AttentionMixture
from moedist.moe.layer import MoE
from moedist.moe.placement import Placement
from moedist.parallel.fully_shard import shard_weights
from moedist.parallel.gradients import GradientTable, ParameterSpread, Role

FSDP_GATHERS = "mesh.fsdp cuts every weight over its ranks and gathers it where it is used"


def spread(
    model: nn.Module,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
    passes: Passes = ONE_PASS,
    alike: str | None = None,
) -> GradientTable:
    """Shards the experts of every MoE layer over ``mesh.ep``, in place, and where ``mesh.fsdp`` says so every weight.

    The experts' stacked weights become DTensors cut along their first dim, so that a checkpoint knows them by global
    id; compute sees this rank's part. Experts that are modules are a rank's own under names with their global ids;
    those of attention may lie on every rank. Works on the meta device: spread first, give storage and values
    afterwards.

    Args:
        model: whole, on one device or meta.
        mesh: the ranks.
        compute_dtype, offload: with ``mesh.fsdp``, see `moedist.parallel.fully_shard.shard_weights`.
        passes, alike: what `AttentionMixture.spread` chooses by; ``mesh.fsdp`` is a reason of its own.

    Raises:
        ConfigError: a layer cannot be spread over this many ranks.
    """
    role_of: dict[nn.Parameter, Role] = {}
    for layer in model.modules():
        if not isinstance(layer, MoE):
            continue
        layer.config.check_spread(mesh.ep.size)
        layer.spread(Placement.in_order(layer.config.num_experts, mesh.ep.size), mesh.ep, mesh.dp)
        _shard(layer.bank.experts, mesh)
        role_of |= dict.fromkeys(layer.bank.experts.parameters(), "experts")
        role_of |= dict.fromkeys(layer.router.parameters(), "router")
    whole: set[nn.Parameter] = set()
    if mesh.fsdp is not None:
        alike = FSDP_GATHERS
    for mixture in [module for module in model.modules() if isinstance(module, AttentionMixture)]:
        mixture.spread(mesh.ep, mesh.dp, passes, alike)
        role_of |= dict.fromkeys(mixture.bank.experts.parameters(), "experts")
        role_of |= dict.fromkeys(mixture.router.parameters(), "router")
        whole |= set() if mixture.bank.sharded else set(mixture.bank.experts.parameters())
    replicated = {name for name, parameter in model.named_parameters() if parameter in whole}
    roles = {n: role_of.get(p, "other") for n, p in model.named_parameters() if p.requires_grad}
    uncut = None
    if mesh.fsdp is not None:
        uncut = shard_weights(model, mesh.fsdp, compute_dtype=compute_dtype, offload=offload)

    def of(name: str, role: Role) -> ParameterSpread:
        if mesh.fsdp is not None and uncut is not None and name not in uncut:
            return ParameterSpread(role, copies=mesh.fsdp.copies, pieces=mesh.fsdp.pieces, summed_in_backward=True)
        if role == "experts" and name not in replicated:
            return ParameterSpread(role, copies=mesh.edp, pieces=mesh.ep)
        return ParameterSpread(role, copies=mesh.dp, pieces=None)

    cut_over = (mesh.ep,) if mesh.fsdp is None else (mesh.fsdp.pieces, mesh.ep)
    return GradientTable({name: of(name, role) for name, role in roles.items()}, mesh.device, cut_over)


def _shard(experts: nn.Module, mesh: Mesh) -> None:
    if mesh.device_mesh is None:
        return
    ep = mesh.device_mesh["ep"]
    for name, value in list(experts.named_parameters(recurse=False)):
        sharded = DTensor.from_local(value.detach(), ep, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(sharded, requires_grad=value.requires_grad))
