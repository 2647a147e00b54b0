"""Shards the experts of a model and says how every parameter lies."""

from __future__ import annotations

import functools

from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from moedist.mesh import Mesh
from moedist.moe.layer import MoELayer
from moedist.moe.placement import Placement
from moedist.parallel.gradients import GradientTable, ParameterSpread


def spread(model: nn.Module, mesh: Mesh) -> GradientTable:
    """Shards the experts of every MoE layer over ``mesh.ep``, in place; dense weights stay whole on every rank.

    The experts' weights become DTensors cut along their first dim, so that a checkpoint knows them by global id;
    compute sees this rank's part. Works on the meta device: spread first, give storage and values afterwards.

    Raises:
        ConfigError: a layer cannot be spread over this many ranks.
    """
    experts: set[nn.Parameter] = set()
    routers: set[nn.Parameter] = set()
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        layer.config.check_spread(mesh.ep.size)
        layer.spread(Placement.in_order(layer.config.num_experts, mesh.ep.size), mesh.ep, mesh.dp)
        _shard(layer.bank.experts, mesh)
        experts.update(layer.bank.experts.parameters())
        routers.update(layer.router.parameters())

    def of(parameter: nn.Parameter) -> ParameterSpread:
        if parameter in experts:
            return ParameterSpread("experts", copies=mesh.edp, pieces=mesh.ep)
        return ParameterSpread("router" if parameter in routers else "other", copies=mesh.dp, pieces=None)

    trainable = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return GradientTable({name: of(parameter) for name, parameter in trainable})


def _shard(experts: nn.Module, mesh: Mesh) -> None:
    if mesh.device_mesh is None:
        return
    ep = mesh.device_mesh["ep"]
    for name, value in list(experts.named_parameters(recurse=False)):
        sharded = DTensor.from_local(value.detach(), ep, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(sharded, requires_grad=value.requires_grad))


def recompute_in_backward(model: nn.Module, targets: tuple[type[nn.Module], ...]) -> None:
    """Forgets the activations inside every module of the given types and recomputes them in backward; in place.

    For attention and banks only. A router, a plan or a loss must never be recomputed: it could route other pairs.
    """
    for module in model.modules():
        if isinstance(module, targets):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
