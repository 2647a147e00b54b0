"""AdamW whose moments are 8-bit numbers with one scale per block of 256 (Dettmers et al. 2022), by torchao."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, ClassVar

import torch

from moedist.config import require
from moedist.train.optimizer.adamw import AdamWConfig

BLOCK = 256
"""Neighbours of one scale, in memory, of the piece that a rank holds."""


@dataclasses.dataclass(frozen=True)
class AdamW8bitConfig(AdamWConfig):
    """AdamW with moments of one byte; computed in fp32.

    A tensor of fewer than 4,096 numbers, or no whole number of blocks, keeps moments in the dtype of the weights.
    """

    element_by_element: ClassVar[bool] = False

    def state_numbers(self, matrices: int, others: int) -> int:
        """Two bytes of each parameter and two scales of four bytes per block, where weights have four."""
        return round((matrices + others) * (0.5 + 2 / BLOCK))

    def update_numbers(self, largest: int) -> int:
        """The new moments before they are rounded, where the compiler does not make it one pass."""
        return 2 * largest

    def of_groups(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Torchao's optimizer over the groups.

        Raises:
            ConfigError: torchao is not installed.
        """
        require(
            importlib.util.find_spec("torchao") is not None,
            "train.optimizer.kind",
            self.kind,
            "needs torchao, which is not installed",
            "Install it (pip install 'moedist[torchao]'), or set train/optimizer to adamw.",
        )
        return AdamW8bit(groups, betas=(self.beta1, self.beta2), eps=self.eps)


class AdamW8bit(torch.optim.Optimizer):
    """torchao's optimizer with learning rates that are numbers, which its own compiled step would not see change.

    Args:
        groups: with ``lr`` and ``weight_decay``.
        betas, eps: of all.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        from torchao.optim import AdamW8bit as Inner

        super().__init__([dict(group) for group in groups], {"lr": 0.0, "weight_decay": 0.0})
        self.inner = Inner(groups, betas=betas, eps=eps, block_size=BLOCK)
        self.state = self.inner.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient; the first of each shape is compiled."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"].fill_(group["lr"])
        self.inner.step()
