"""What turns a loss into a changed model."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.parallel.gradients import GradientTable


class Engine(Protocol):
    """Backward, step and state of one run; made once per run on every rank."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the global loss."""
        ...

    def step(self) -> float:
        """Sums the gradients over ranks, clips, updates, clears.

        Returns:
            The norm of the whole model's gradient before the clip, equal on all ranks. Where it is not finite, the
            model and the optimizer are left as they were.
        """
        ...

    def set_learning_rate(self, factor: float) -> None:
        """Sets every parameter group to ``factor`` x its own peak."""
        ...

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate by group name."""
        ...

    def state(self) -> dict[str, Any]:
        """Model and optimizer as a nested mapping of live tensors by global names: read by a save, filled in place by a
        load."""
        ...


@dataclasses.dataclass(frozen=True)
class EngineConfig(Choice, path="engine"):
    """One engine."""

    def build(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: GradientTable,
        clip_norm: float | None,
    ) -> Engine:
        """Takes charge of a spread model and its optimizer; ``clip_norm`` None for no clip."""
        raise NotImplementedError
