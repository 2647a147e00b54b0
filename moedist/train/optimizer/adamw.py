"""AdamW (Loshchilov and Hutter 2019) with a learning rate for each role of a parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moedist.config import require
from moedist.parallel.gradients import GradientTable
from moedist.train.optimizer.contract import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW.

    Attributes:
        router_lr, experts_lr, other_lr: peak learning rates of the routers, of the routed experts, and of all else.
        weight_decay: of matrices; norms and biases do not decay.
        beta1, beta2, eps: as in the paper.
    """

    router_lr: float = 1e-3
    experts_lr: float = 5e-4
    other_lr: float = 5e-4
    weight_decay: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for key in ("router_lr", "experts_lr", "other_lr", "weight_decay", "eps"):
            value = getattr(self, key)
            require(value >= 0, key, value, "is negative", "Set it to 0 or more.")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, key, value, "is no decay rate", "Set it to 0 or more, and below 1.")

    def state_numbers(self, matrices: int, others: int) -> int:
        """Two moments of each."""
        return 2 * (matrices + others)

    def update_numbers(self, largest: int) -> int:
        """None: the fused kernel makes nothing."""
        return 0

    def build(self, model: nn.Module, gradients: GradientTable) -> torch.optim.Optimizer:
        """One group per role and decay, and per way to lie over ranks. Updated by torch's fused kernel."""
        return self.of_groups(groups_by_role(model, roles_of(gradients), self.rates, self.weight_decay))

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rate by role."""
        return {"router": self.router_lr, "experts": self.experts_lr, "other": self.other_lr}

    def of_groups(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW over the groups."""
        # A dry run's parameters have no storage, which the fused kernel asks for when it is chosen.
        fused = all(not parameter.is_meta for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused or None)


def roles_of(gradients: GradientTable) -> dict[str, str]:
    """Role of each parameter, by name."""
    return {name: spread.role for name, spread in gradients.spread_of.items()}


def groups_by_role(
    model: nn.Module, role_of: Mapping[str, str], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: every trainable parameter in one, by its role, by whether it decays (matrices do, norms and
    biases don't) and by the ranks over which it is cut, because torch's fused kernels take one kind of tensor a call.

    Args:
        model: whose parameters.
        role_of: by parameter name.
        rates: learning rate by role.
        weight_decay: of matrices.
    """
    groups: dict[tuple[str, bool, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and not name.endswith("bias")
            cut = str(parameter.device_mesh.mesh_dim_names) if isinstance(parameter, DTensor) else ""
            groups.setdefault((role_of[name], decays, cut), []).append(parameter)
    return [
        {"name": role, "params": parameters, "lr": rates[role], "weight_decay": weight_decay if decays else 0.0}
        for (role, decays, _), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
