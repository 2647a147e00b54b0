"""How large each expert's weights and gradients are, wherever the expert lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moedist.moe.layer import MoELayer
from moedist.parallel.gradients import GradientTable


def expert_squares(
    layers: Sequence[MoELayer], model: nn.Module, gradients: GradientTable, of: Callable[[nn.Parameter], Tensor | None]
) -> Tensor | None:
    """fp64 [L, E]: this rank's share of each expert's squared 2-norm: the sum over all ranks is the square.

    Args:
        layers: the MoE layers of ``model``, of equally many experts.
        model: spread.
        gradients: how its parameters lie.
        of: what to take of a parameter: itself, or its gradient.

    Returns:
        None where experts are no stacked weights, or one of the tensors is not there.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    shares = []
    for layer in layers:
        share_E = torch.zeros(layer.config.num_experts, dtype=torch.float64, device=gradients.device)
        stacked = [each for each in _stacked(layer) if each in names]
        if not stacked:
            return None
        for parameter in stacked:
            tensor = of(parameter)
            if tensor is None:
                return None
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            square_e = torch.linalg.vector_norm(local.detach().flatten(1), dim=1, dtype=torch.float64).square()
            copies = gradients.spread_of[names[parameter]].copies.size
            share_E.index_add_(
                0, _expert_ids(layer, parameter).to(share_E.device), square_e.to(share_E.device) / copies
            )
        shares.append(share_E)
    return torch.stack(shares)


def _stacked(layer: MoELayer) -> Iterator[nn.Parameter]:
    """Parameters whose first dim counts experts."""
    experts = layer.bank.experts
    for parameter in experts.parameters(recurse=False):
        sizes = {len(experts.expert_ids), layer.config.num_experts}
        if parameter.requires_grad and parameter.dim() > 1 and parameter.shape[0] in sizes:
            yield parameter


def _expert_ids(layer: MoELayer, parameter: nn.Parameter) -> Tensor:
    """Global ids of the experts that a parameter's rows on this rank belong to."""
    ids = layer.bank.experts.expert_ids
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.shape[0] == len(ids):
        return torch.tensor(ids, dtype=torch.int64)
    assert isinstance(parameter, DTensor), f"{local.shape[0]} rows of {len(ids)} experts"
    # Cut between experts: only where no other dim divides (`moedist.parallel.fully_shard.dim_to_cut`).
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return torch.arange(offset[0], offset[0] + local.shape[0])
