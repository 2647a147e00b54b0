"""All parameters of a layer as one vector: router, expert 0, expert 1, ..., whatever ranks the experts live on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moedist.mesh.collectives import all_gather
from moedist.moe.layer import MoE
from moedist.moe.modules import ModuleExperts

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def gather_flat(moe: MoE, numel_E: Sequence[int]) -> Tensor:
    """[P]: every number of the layer, on every rank, in a type that holds them all; collective over the
    expert-parallel ranks.

    Args:
        moe: of experts that are modules.
        numel_E: how many numbers each expert has.
    """
    experts, ids_of_rank = experts_of(moe), moe.bank.placement.expert_ids
    dtype, device = common_dtype(moe), device_of(moe)
    own = vector(experts.parameters(), dtype, device)
    # Padded to the longest rank's: all_gather wants one length. (A sum over ranks would turn -0 to 0.)
    padded = torch.zeros(max(sum(numel_E[expert] for expert in ids) for ids in ids_of_rank), dtype=dtype, device=device)
    padded[: own.numel()] = own
    part_of: dict[int, Tensor] = {}
    for row, ids in zip(all_gather(padded, moe.bank.ep), ids_of_rank, strict=True):
        sizes = [numel_E[expert] for expert in ids]
        part_of |= zip(ids, row[: sum(sizes)].split(sizes), strict=True)
    router = vector(moe.router.parameters(), dtype, device)
    return torch.cat([router, *(part_of[expert] for expert in range(len(numel_E)))])


@torch.no_grad()
def scatter_flat(moe: MoE, numel_E: Sequence[int], flat: Tensor) -> None:
    """Writes this rank's part of ``flat`` [P] into its parameters."""
    experts, router = experts_of(moe), list(moe.router.parameters())
    of_router, *of_expert = flat.split([sum(parameter.numel() for parameter in router), *numel_E])
    fill(router, of_router)
    for expert in experts.expert_ids:
        fill(list(experts.expert[str(expert)].parameters()), of_expert[expert])


def experts_of(moe: MoE) -> ModuleExperts:
    """The experts.

    Raises:
        ValueError: FSDP has cut the weights, of which a rank then holds pieces.
    """
    if any(isinstance(parameter, DTensor) for parameter in moe.parameters()):
        raise ValueError("the layer's weights are cut by FSDP: save and load its state_dict in place of a flat vector")
    assert isinstance(moe.bank.experts, ModuleExperts)
    return moe.bank.experts


def common_dtype(moe: MoE) -> torch.dtype:
    """The type that holds every rank's numbers exactly; collective."""
    dtypes = {parameter.dtype for parameter in moe.parameters()} or {torch.float32}
    own = functools.reduce(torch.promote_types, dtypes)
    number = torch.tensor([DTYPES.index(own)], device=device_of(moe))
    everyone = all_gather(number, moe.bank.ep).flatten().tolist()
    return functools.reduce(torch.promote_types, [DTYPES[number] for number in everyone])


def device_of(moe: MoE) -> torch.device:
    """Where the layer lies."""
    return next(moe.parameters(), torch.empty(0)).device


def vector(parameters: Iterable[nn.Parameter], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[P]: of parameters one after the other."""
    return torch.cat([torch.zeros(0, dtype=dtype, device=device), *(p.reshape(-1).to(dtype) for p in parameters)])


def fill(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Writes a vector into parameters of as many numbers."""
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
