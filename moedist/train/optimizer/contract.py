"""The update rule and its parameter groups."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from moedist.config import Choice
from moedist.parallel.gradients import GradientTable


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Choice, path="train.optimizer"):
    """One update rule."""

    def build(self, model: nn.Module, gradients: GradientTable) -> torch.optim.Optimizer:
        """The optimizer of a spread model. Every trainable parameter is in exactly one group; each group has a ``name``
        and its peak learning rate as ``lr``."""
        raise NotImplementedError
