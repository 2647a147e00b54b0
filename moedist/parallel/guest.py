"""MoE layers as guests: in a loop that is not ours, whose wrapper (DDP, FSDP2) averages gradients over ranks.

There the loss of a step is the *mean* of the ranks' losses, as it is for the dense weights. Our own engines add shares
up instead (docs/decisions/0002); a rank's share times the number of ranks is its loss here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moedist.mesh import Axis, Mesh
from moedist.mesh.collectives import all_sum
from moedist.moe.layer import MoE
from moedist.parallel.spread import spread


def spread_as_guest(model: nn.Module, mesh: Mesh) -> dict[str, nn.Parameter]:
    """Shards the experts of every MoE layer over ``mesh.ep``, in place, for a loop that averages gradients.

    Call it before anything that takes hold of parameters: DDP, ``fully_shard``, the optimizer. From then on a backward
    pass leaves in every expert the mean over all ranks of their losses' gradients, as DDP and FSDP2 do in the other
    weights, accumulation included. DDP leaves the experts alone when it wraps this very ``model``.

    Returns:
        The experts' parameters (DTensors) by name: for an optimizer group of their own, and for ``fully_shard`` to
        ignore.

    Raises:
        ConfigError: a layer cannot be spread over this many ranks.
        ValueError: no MoE layer, one that is spread already, a model that is wrapped already, or a mesh by which every
            weight would be cut.
    """
    if mesh.fsdp is not None:
        raise ValueError("a mesh with fsdp cuts every weight, which here is the wrapper's part: take adopt_mesh's")
    names = experts_to_spread(model)
    spread(model, mesh)
    experts = {name: model.get_parameter(name) for name in names}
    for parameter in experts.values():
        if parameter.requires_grad and mesh.dp.size > 1:
            parameter.register_hook(lambda grad: _mean(grad, mesh))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return experts


def experts_to_spread(model: nn.Module) -> list[str]:
    """Names of the experts' parameters of somebody's model.

    Raises:
        ValueError: it holds none, or they are spread already, or the model is wrapped already.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | FSDPModule):
            raise ValueError(
                f"{name or 'the model'} is wrapped already ({type(module).__name__}), and the wrapper holds on to the "
                "whole experts: spread them first, wrap then"
            )
        if isinstance(module, MoE):
            own = {f"{name}.{key}".lstrip("."): value for key, value in module.named_parameters()}
            experts = set(module.bank.experts.parameters())
            lie_whole = len(module.bank.experts.expert_ids) == module.config.num_experts
            if not lie_whole or any(isinstance(parameter, DTensor) for parameter in experts):
                raise ValueError(f"{name or 'the layer'} is spread already: spread a model once")
            found += [key for key, value in own.items() if value in experts]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no MoE layer: there is nothing to spread")
    return found


def _mean(grad: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the ranks that hold the same experts, divided by *all* ranks: an expert's gradient holds the tokens of
    its whole expert-parallel group already."""
    assert isinstance(grad, DTensor)
    mean = all_sum(grad.to_local() / mesh.dp.size, mesh.edp)
    return DTensor.from_local(mean, grad.device_mesh, grad.placements, run_check=False)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scales the gradients of ``model`` so that their norm is at most ``max_norm``; collective, called by every rank.

    torch's ``clip_grad_norm_`` cannot add up plain tensors and DTensors of several meshes. Here a DTensor says itself
    how it lies: the squares of its pieces are summed over the ranks that hold them, and copies count once.

    Args:
        model: gradients complete, as backward leaves them in DDP or FSDP2.
        max_norm: None measures only.

    Returns:
        0-dim: the 2-norm of the whole model's gradient before the clip, equal on all ranks. Where it is not finite the
        gradients become so too: skip the step.
    """
    grads_of: dict[tuple[Axis, ...], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Filed by the parameter, which every rank has: without a gradient a rank still takes part in the sums.
            grads = grads_of.setdefault(_pieces(parameter), [])
            if parameter.grad is not None:
                grads.append(parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad)
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for pieces, grads in grads_of.items():
        square = torch.zeros_like(total)
        for norm in torch._foreach_norm(grads) if grads else ():
            square += norm.double().square()
        for axis in pieces:
            all_sum(square, axis)
        total += square
    total = total.sqrt()
    if max_norm is not None:
        scale = (max_norm / total).clamp_max(1)
        for grads in grads_of.values():
            for grad in grads:
                grad.mul_(scale)
    return total


def _pieces(parameter: Tensor) -> tuple[Axis, ...]:
    """The lines of ranks over which a parameter is cut."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        Axis(f"dim {dim}", mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim).group_name)
        for dim, placement in enumerate(parameter.placements)
        if placement.is_shard()
    )
