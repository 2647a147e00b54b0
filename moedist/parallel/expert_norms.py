"""How large each expert's weights and gradients are, wherever the expert lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moedist.moe.layer import MoE
from moedist.parallel.gradients import GradientTable


class ExpertNorms:
    """Norms of every expert's stacked weights, or of their gradients.

    Args:
        layers: the MoE layers of ``model``, of equally many experts.
        model: spread.
        gradients: how its parameters lie.
    """

    def __init__(self, layers: Sequence[MoE], model: nn.Module, gradients: GradientTable):
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._shape = (len(layers), max((layer.config.num_experts for layer in layers), default=0))
        self._parameters: list[nn.Parameter] = []
        places, copies = [], []
        for place, layer in enumerate(layers):
            for parameter in _stacked(layer):
                ids = _expert_ids(layer, parameter)
                self._parameters.append(parameter)
                places.append(place * self._shape[1] + ids)
                copies.append(torch.full_like(ids, gradients.spread_of[names[parameter]].copies.size))
        device = gradients.device
        self._place_X = torch.cat(places).to(device) if places else torch.zeros(0, dtype=torch.int64, device=device)
        self._copies_X = torch.cat(copies).to(device) if copies else self._place_X

    def squares(self, of: Callable[[nn.Parameter], Tensor | None]) -> Tensor | None:
        """fp64 [L, E]: this rank's share of each expert's squared 2-norm: the sum over all ranks is the square.

        Args:
            of: what to take of a parameter: itself, or its gradient.

        Returns:
            None where experts are no stacked weights, or one of the tensors is not there.
        """
        norms = []
        for parameter in self._parameters:
            tensor = of(parameter)
            if tensor is None:
                return None
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            norms.append(torch.linalg.vector_norm(local.detach().flatten(1), dim=1))
        if not norms:
            return None
        square_X = torch.cat(norms).to(self._place_X.device).double().square() / self._copies_X
        flat = torch.zeros(self._shape[0] * self._shape[1], dtype=torch.float64, device=square_X.device)
        return flat.index_add_(0, self._place_X, square_X).view(self._shape)


def _stacked(layer: MoE) -> Iterator[nn.Parameter]:
    """Parameters whose first dim counts experts."""
    experts = layer.bank.experts
    for parameter in experts.parameters(recurse=False):
        sizes = {len(experts.expert_ids), layer.config.num_experts}
        if parameter.requires_grad and parameter.dim() > 1 and parameter.shape[0] in sizes:
            yield parameter


def _expert_ids(layer: MoE, parameter: nn.Parameter) -> Tensor:
    """int64: global ids of the experts that a parameter's rows on this rank belong to."""
    ids = layer.bank.experts.expert_ids
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.shape[0] == len(ids):
        return torch.tensor(ids, dtype=torch.int64)
    assert isinstance(parameter, DTensor), f"{local.shape[0]} rows of {len(ids)} experts"
    # Cut between experts: only where no other dim divides (`moedist.parallel.fully_shard.dim_to_cut`).
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return torch.arange(offset[0], offset[0] + local.shape[0])
