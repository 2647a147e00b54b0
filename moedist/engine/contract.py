"""What turns a loss into a changed model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.mesh import Mesh, MeshConfig
from moedist.parallel.gradients import GradientTable

GradientOf = Callable[[nn.Parameter], Tensor | None]
"""A parameter's gradient, or the part of it that this rank holds; None where there is none."""


class Engine(Protocol):
    """Backward, step and state of one run; made once per run on every rank."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of this rank's share of the global loss; ``last`` for the step's last micro-batch."""
        ...

    def step(self, summed: Callable[[GradientOf], None] = lambda gradient_of: None) -> float:
        """Sums the gradients over ranks, clips, updates, clears.

        Args:
            summed: called by all ranks once gradients are those of the global batch, before the clip, with what tells
                them.

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
        """Model and optimizer as a nested mapping of tensors by global names: read by a save, filled in place by a
        load, after which `restore` is called with it."""
        ...

    def restore(self, state: dict[str, Any], num_steps: int) -> None:
        """Takes over what a load has filled, copies of what this engine keeps in another form, and goes on after
        ``num_steps`` optimizer steps."""
        ...

    def notes(self) -> Sequence[str]:
        """What a user should know of this engine before the first step, line by line."""
        ...

    def settings(self) -> Mapping[str, Any] | None:
        """What the engine runs with beyond the run's configuration, as JSON: the run folder keeps it as
        ``<kind>.json``. None for nothing."""
        ...

    def close(self) -> None:
        """Lets go of the run's process groups; called once, before they end."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """An optimizer step as an engine must know it.

    Attributes:
        micro_batch: rows per rank and micro-step.
        accumulation: micro-steps per optimizer step.
        precision: of the forward pass; weights are fp64 under ``fp64`` and fp32 otherwise.
        clip_norm: largest norm of the whole model's gradient; None for no clip.
        num_steps: optimizer steps of the whole run.
        warmup_steps: those at its start in which learning rates grow.
    """

    micro_batch: int
    accumulation: int
    precision: Literal["fp32", "bf16", "fp64"]
    clip_norm: float | None
    num_steps: int = 1
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True)
class EngineConfig(Choice, path="engine"):
    """One engine."""

    @property
    def weights_on_host(self) -> bool:
        """Whether weights that ``mesh.fsdp`` cuts, their gradients and what the optimizer keeps lie on the host."""
        return False

    @property
    def alike(self) -> str | None:
        """Why all ranks must have the same parameters beside the experts of MoE layers, as the rest of a sentence; None
        where they need not."""
        return None

    @property
    def cuts_anywhere(self) -> str | None:
        """Why an optimizer must update each number of a parameter alone, as the rest of a sentence; None where it need
        not."""
        return None

    def one_order(self, step: TrainingStep, world_size: int) -> str | None:
        """Why gradients must arrive in one order on all ranks, as the rest of a sentence; None where they need not."""
        return None

    def check(self, step: TrainingStep, mesh: MeshConfig, world_size: int) -> None:
        """Raises `ConfigError`, with full keys, where this engine cannot run such a step on such a mesh."""

    def build(
        self,
        model: nn.Module,
        mesh: Mesh,
        optimizer: torch.optim.Optimizer,
        gradients: GradientTable,
        step: TrainingStep,
    ) -> Engine:
        """Takes charge of a spread model and its optimizer."""
        raise NotImplementedError
