"""What turns a loss into a changed model."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.parallel.gradients import GradientTable


class Engine(Protocol):
    """Backward, step, save and load of one run; made once per run on every rank."""

    model: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the global loss."""
        ...

    def step(self) -> Tensor:
        """Sums the gradients over ranks, clips, updates, clears. Returns the norm of the whole model's gradient before
        the clip, 0-dim, equal on all ranks. Leaves the model unchanged where the norm is not finite."""
        ...

    def state(self) -> dict[str, Any]:
        """Model and optimizer as a nested mapping of tensors by global names, for `torch.distributed.checkpoint`:
        the values are the live tensors (or DTensors), filled in place by a load."""
        ...

    def loaded(self) -> None:
        """Called after `state`'s tensors were filled."""
        ...

    def set_learning_rate(self, factor: float) -> None:
        """Sets every parameter group to ``factor`` x its own peak learning rate."""
        ...


@dataclasses.dataclass(frozen=True)
class EngineConfig(Choice, path="engine"):
    """One engine."""

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, gradients: GradientTable) -> Engine:
        """Wraps a spread model and its optimizer."""
        raise NotImplementedError
