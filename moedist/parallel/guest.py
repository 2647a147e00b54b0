"""MoE layers as guests: in a loop that is not ours, whose wrapper (DDP, FSDP2) averages gradients over ranks.

There the loss of a step is the *mean* of the ranks' losses, as it is for the dense weights. Our own engines add shares
up instead (docs/decisions/0002); a rank's share times the number of ranks is its loss here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moedist.mesh import Axis, Mesh
from moedist.mesh.collectives import all_sum
from moedist.moe.layer import MoE
from moedist.parallel.spread import spread

WRAPPERS_AVERAGE = "the wrapper of somebody's own loop averages every parameter over all ranks"


def spread_as_guest(model: nn.Module, mesh: Mesh) -> dict[str, nn.Parameter]:
    """Shards the experts of every MoE layer over ``mesh.ep``, in place, for a loop that averages gradients.

    Call it before anything that takes hold of parameters: DDP, ``fully_shard``, the optimizer. From then on a backward
    pass leaves in every expert the mean over all ranks of their losses' gradients, as DDP and FSDP2 do in the other
    weights, accumulation included. DDP leaves the experts alone when it wraps this very ``model``. Attention experts
    stay whole on every rank, and are weights like all others to the wrapper.

    Returns:
        This rank's experts' parameters by name (DTensors, or of experts that are modules plain tensors): for an
        optimizer group of their own, and for ``fully_shard`` to ignore.

    Raises:
        ConfigError: a layer cannot be spread over this many ranks.
        ValueError: no MoE layer, one that is spread already, a model that is wrapped already, or a mesh by which every
            weight would be cut.
    """
    if mesh.fsdp is not None:
        raise ValueError("a mesh with fsdp cuts every weight, which here is the wrapper's part: take adopt_mesh's")
    names = experts_to_spread(model)
    spread(model, mesh, alike="a loop that averages gradients must know them on every rank")
    experts = {name: parameter for name, parameter in model.named_parameters() if name in names}
    trained = [parameter for parameter in experts.values() if parameter.requires_grad and mesh.dp.size > 1]
    for parameter in trained:
        if isinstance(parameter, DTensor):
            parameter.register_hook(lambda grad: _mean(grad, mesh))
    modules = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
    if modules:
        MeanTogether(modules, mesh)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))
    return experts


def experts_to_spread(model: nn.Module) -> set[str]:
    """Names of the experts' parameters and buffers in somebody's model.

    Raises:
        ValueError: it holds none, or they are spread already, or the model is wrapped already.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | FSDPModule):
            raise ValueError(
                f"{name or 'the model'} is wrapped already ({type(module).__name__}), and the wrapper holds on to the "
                "whole experts: spread them first, wrap then"
            )
        if isinstance(module, MoE):
            experts = module.bank.experts
            lie_whole = len(experts.expert_ids) == module.config.num_experts
            if not lie_whole or any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
                raise ValueError(f"{name or 'the layer'} is spread already: spread a model once")
            own = (*experts.named_parameters(), *experts.named_buffers())
            found |= {f"{name}.bank.experts.{key}".lstrip(".") for key, _ in own}
    if not found:
        raise ValueError(f"{type(model).__name__} holds no MoE layer: there is nothing to spread")
    return found


def _mean(grad: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the ranks that hold the same experts, divided by *all* ranks: an expert's gradient holds the tokens of
    its whole expert-parallel group already."""
    mean = all_sum((grad.to_local() if isinstance(grad, DTensor) else grad) / mesh.dp.size, mesh.edp)
    if isinstance(grad, DTensor):
        return DTensor.from_local(mean, grad.device_mesh, grad.placements, run_check=False)
    return mean


class MeanTogether:
    """The mean for experts that are modules: all at once when backward ends.

    Their gradients arrive in an order that depends on which of them a rank has called, and so differs between ranks,
    where a collective needs one order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Mesh):
        self._parameters, self._mesh = parameters, mesh
        self._arrived: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            parameter.register_hook(functools.partial(self._arrive, parameter))

    def _arrive(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        """Keeps the gradient; zeros join ``parameter.grad`` in its place."""
        if not self._arrived:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._arrived[parameter] = grad
        return torch.zeros_like(grad)

    @torch.no_grad()
    def _finish(self) -> None:
        for parameter in self._parameters:
            mean = _mean(self._arrived.pop(parameter, torch.zeros_like(parameter)), self._mesh)
            parameter.grad = mean if parameter.grad is None else parameter.grad + mean


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scales the gradients of ``model`` so that their norm is at most ``max_norm``; collective, called by every rank.

    torch's ``clip_grad_norm_`` cannot add up plain tensors and DTensors of several meshes. Here a DTensor says itself
    how it lies, and of experts that are modules their bank does: the squares of pieces are summed over the ranks that
    hold them, and copies count once.

    Args:
        model: gradients complete, as backward leaves them in DDP or FSDP2.
        max_norm: None measures only.

    Returns:
        0-dim: the 2-norm of the whole model's gradient before the clip, equal on all ranks. Where it is not finite the
        gradients become so too: skip the step.
    """
    banks = [layer.bank for layer in model.modules() if isinstance(layer, MoE)]
    of_expert = {parameter: (bank.ep,) for bank in banks for parameter in bank.experts.parameters()}
    # Filed by what every rank has, banks and dense parameters: without a gradient a rank still takes part in the sums.
    grads_of: dict[tuple[Axis, ...], list[Tensor]] = {(bank.ep,): [] for bank in banks}
    for parameter in model.parameters():
        if parameter.requires_grad:
            whole = of_expert.get(parameter, ())
            grads = grads_of.setdefault(_pieces(parameter) if isinstance(parameter, DTensor) else whole, [])
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


def _pieces(parameter: DTensor) -> tuple[Axis, ...]:
    """The lines of ranks over which a DTensor is cut."""
    mesh = parameter.device_mesh
    return tuple(
        Axis(f"dim {dim}", mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim).group_name)
        for dim, placement in enumerate(parameter.placements)
        if placement.is_shard()
    )
