"""The update rule and its parameter groups."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from moedist.config import Choice
from moedist.parallel.gradients import GradientTable


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Choice, path="train.optimizer"):
    """One update rule.

    Attributes:
        element_by_element: whether each number of a parameter is updated from its own gradient and history alone, so
            that an engine may cut parameters anywhere.
    """

    element_by_element: ClassVar[bool] = True

    def state_numbers(self, matrices: int, others: int) -> int:
        """How many numbers, in the dtype of the weights, the optimizer keeps.

        Args:
            matrices: weights in the matrices of blocks, experts' among them.
            others: all other parameters: routers, the input embedding, the head.
        """
        raise NotImplementedError

    def update_numbers(self, largest: int) -> int:
        """How many numbers an update holds besides, at its worst.

        Args:
            largest: of the largest parameter: as a rank holds it where `element_by_element`, else whole.
        """
        raise NotImplementedError

    def build(self, model: nn.Module, gradients: GradientTable) -> torch.optim.Optimizer:
        """The optimizer of a spread model. Every trainable parameter is in exactly one group; each group has a ``name``
        and its peak learning rate as ``lr``."""
        raise NotImplementedError
