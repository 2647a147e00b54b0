"""Muon (Jordan et al. 2024): a matrix is updated by its momentum made orthogonal; AdamW for all that is no matrix.

Experts are matrices of their own: a stack [e, D, F] is e matrices, never one. Where FSDP cuts matrices, the ranks that
hold the pieces gather the momentum and each makes the whole of it orthogonal; over ``ep`` experts are whole already.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moedist.config import require
from moedist.parallel.gradients import GradientTable
from moedist.train.optimizer.adamw import AdamWConfig, groups_by_role, roles_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024): steep at 0, and all singular values end near 1."""
ITERATIONS = 5
EPS = 1e-7


@dataclasses.dataclass(frozen=True)
class MuonConfig(AdamWConfig):
    """Muon for matrices, AdamW for the rest.

    An orthogonal update is scaled by ``0.2 * sqrt(max(rows, columns))``, which gives it the size of AdamW's (Liu et al.
    2025, "Muon is scalable for LLM training", equation 4): rates and decay mean what they mean there.

    Attributes:
        momentum: decay of the momentum, which is Nesterov's.
        elementwise: names of matrices that AdamW updates; ``*`` stands for anything. Routers are always among them.

    Rates and decay of `AdamWConfig` are those of both rules, its moments AdamW's.
    """

    element_by_element: ClassVar[bool] = False

    momentum: float = 0.95
    elementwise: tuple[str, ...] = ("embedding.*", "head.*")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "is no decay", "Set it to 0 or more, and below 1.")

    def state_numbers(self, matrices: int, others: int) -> int:
        """One of each in matrices, two of all others."""
        return matrices + 2 * others

    def update_numbers(self, largest: int) -> int:
        """The update, the iterate and what it is multiplied with, and the products."""
        return 4 * largest

    def build(self, model: nn.Module, gradients: GradientTable) -> torch.optim.Optimizer:
        """Groups as AdamW's, matrices apart."""
        roles = roles_of(gradients)
        matrices = {
            parameter
            for name, parameter in model.named_parameters()
            if name in roles and self.takes(name, parameter, roles[name])
        }
        whole: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in groups_by_role(model, roles, self.rates, self.weight_decay):
            for side, wanted in ((whole, True), (others, False)):
                if chosen := [parameter for parameter in group["params"] if (parameter in matrices) is wanted]:
                    side.append({**group, "params": chosen})
        return Muon(whole, self.of_groups(others) if others else None, self.momentum)

    def takes(self, name: str, parameter: nn.Parameter, role: str) -> bool:
        """Whether a parameter is a matrix, or a stack of experts', that Muon updates."""
        if role == "router" or name.endswith("bias") or any(fnmatch.fnmatch(name, each) for each in self.elementwise):
            return False
        return parameter.dim() == 2 or (parameter.dim() == 3 and role == "experts")


class Muon(torch.optim.Optimizer):
    """Muon over groups of matrices; what AdamW has is part of this optimizer's groups and state.

    Args:
        groups: of parameters of two dims, or stacks of matrices of three; each with ``lr`` and ``weight_decay``.
        others: of all other parameters, or None.
        momentum: see `MuonConfig`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], others: torch.optim.Optimizer | None, momentum: float):
        super().__init__(groups or [{"params": []}], {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})
        self.matrices = self.param_groups = self.param_groups if groups else []
        self.others = others
        if others is not None:
            self.param_groups = [*self.matrices, *others.param_groups]
            self.state = others.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        for group in self.matrices:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        if self.others is not None:
            self.others.step()

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = orthogonal(grad.lerp(momentum, group["momentum"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = 0.2 * math.sqrt(max(parameter.shape[-2:]))
        parameter.add_(update, alpha=-group["lr"] * size)


def orthogonal(update: Tensor) -> Tensor:
    """`newton_schulz` of each matrix of [..., m, n]; of a DTensor, with matrices gathered that lie in pieces."""
    if not isinstance(update, DTensor):
        return newton_schulz(update)
    # A stack that is cut along its first dim alone is in whole matrices.
    kept = [
        place if update.dim() == 3 and getattr(place, "dim", None) == 0 else Replicate() for place in update.placements
    ]
    whole = update.redistribute(placements=kept)
    made = DTensor.from_local(
        newton_schulz(whole.to_local()),
        update.device_mesh,
        kept,
        run_check=False,
        shape=update.shape,
        stride=update.stride(),
    )
    return made.redistribute(placements=update.placements)


def newton_schulz(update: Tensor) -> Tensor:
    """[..., m, n]: nearly the nearest matrix whose singular values are all 1, of each matrix; zero stays zero.

    In bf16 on CUDA for fp32, as published; else in the dtype that comes.
    """
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    if x.device.type == "cuda" and x.dtype == torch.float32:
        x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(update.dtype)
