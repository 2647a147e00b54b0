"""FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023): weights cut over ranks, gathered where they are used.

Cut are dense weights over all ranks of ``mesh.fsdp``, an expert's over those that hold the expert. Each unit's weights
are gathered by one collective before its forward and its backward, and its gradients summed and cut by one after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree

from moedist.mesh import FullyShard
from moedist.model.attention.mixture import AttentionMixture
from moedist.model.contract import LanguageModel
from moedist.moe.layer import MoE, MoEOutput
from moedist.moe.plan import CapacityPlan
from moedist.moe.report import MoEReport
from moedist.moe.router.contract import Routing

for _type in (CapacityPlan, Routing, MoEOutput, MoEReport):
    # FSDP hooks the tensors with gradient that enter and leave a unit. Older ones look for them as pytrees alone: a
    # balance loss that it does not see would start a backward whose weights nobody gathers.
    _pytree.register_dataclass(_type)

# What units return may be views (a gate of a reshaped matrix); nothing here writes into what a module has returned.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def shard_weights(
    model: nn.Module, axes: FullyShard, *, compute_dtype: torch.dtype | None = None, offload: bool = False
) -> set[str]:
    """Cuts every parameter over the axes, in place, experts' after they are DTensors over ``ep``; builds on meta.

    Units: each router (in the dtype of its weights, whatever the others compute in), each layer's bank of experts,
    each of ``LanguageModel.units``, and the rest. No unit casts what it takes or returns: a report's fp32 stays fp32.

    Args:
        model: a `LanguageModel`, or any module with MoE layers.
        axes: where the pieces go.
        compute_dtype: weights are gathered in it, and so computed in it; gradients are summed in the weights' own.
            None for the weights' own.
        offload: whether weights, gradients and what the optimizer keeps lie on the host.

    Returns:
        names of the parameters that are not cut: those without a dim.
    """
    whole = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    names = {name for name, parameter in model.named_parameters() if parameter in whole}
    weights_dtype = next(model.parameters()).dtype
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(compute_dtype, reduce_dtype=weights_dtype, cast_forward_inputs=False)
    policy = CPUOffloadPolicy(pin_memory=axes.dense.device_type == "cuda") if offload else OffloadPolicy()

    def shard(module: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
        size = mesh.size(mesh.ndim - 1)
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=policy,
            shard_placement_fn=lambda parameter: Shard(dim_to_cut(parameter, size)),
            ignored_params=whole,
        )

    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        shard(layer.router, axes.dense, own)
        # Around the bank, so that no hook runs inside what is recomputed.
        shard(layer.bank, axes.experts, narrow)
    for mixture in [module for module in model.modules() if isinstance(module, AttentionMixture)]:
        shard(mixture.router, axes.dense, own)
    for part in model.units() if isinstance(model, LanguageModel) else ():
        shard(part, axes.dense, narrow)
    shard(model, axes.dense, narrow)
    for unit in units_of(model):
        # Every rank's loss is a share of the one loss, so a gradient is a plain sum. Without the second call FSDP would
        # multiply by 1 / factor inside the collective, which not every backend can.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return names


def dim_to_cut(parameter: Tensor, size: int) -> int:
    """The dim along which a parameter is cut into ``size`` pieces: the first that divides evenly, else the first.

    Experts that lie over ``ep`` are cut inside: dim 0, which counts experts, comes last.
    """
    dims = list(range(parameter.dim()))
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if isinstance(parameter, DTensor):
        dims = [*dims[1:], 0]
    return next((dim for dim in dims if local.shape[dim] % size == 0), 0)


def units_of(model: nn.Module) -> list[FSDPModule]:
    """Every unit below ``model``, itself included; none where weights are not cut."""
    modules: Iterable[object] = model.modules()
    return [module for module in modules if isinstance(module, FSDPModule)]


def sum_replicas(model: nn.Module, now: bool) -> None:
    """Whether the backward that comes sums over replicas; the last of a step must.

    Gradients are summed and cut within a replica in every backward, so that accumulation keeps pieces and never a
    whole gradient; the sum over replicas waits for the last. The total is the same.
    """
    for unit in units_of(model):
        unit.set_requires_all_reduce(now, recurse=False)


def release(model: nn.Module) -> None:
    """Frees the weights that a forward pass without backward has left gathered (the root's)."""
    for unit in units_of(model):
        unit.reshard()


def keep_on_device(model: nn.Module, device: torch.device) -> None:
    """Moves to the device what is not gathered there: buffers, and parameters that are not cut; the rest stays."""
    kept = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    for tensor in (*kept, *model.buffers()):
        tensor.data = tensor.data.to(device)
