"""Our own engine: experts sharded, dense weights whole on every rank or, with ``mesh.fsdp``, cut as well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moedist.config import require
from moedist.engine.contract import EngineConfig, GradientOf, TrainingStep
from moedist.mesh import Mesh, MeshConfig
from moedist.parallel import GradientTable, sum_replicas


@dataclasses.dataclass(frozen=True)
class NativeConfig(EngineConfig):
    """Plain torch; how weights lie is the mesh's.

    Attributes:
        offload: keep the pieces of weights, their gradients and the optimizer's state on the host, where the update is
            computed, and gather weights to the device unit by unit. Needs ``mesh.fsdp``; 1 will do on one rank.
    """

    offload: bool = False

    @property
    def weights_on_host(self) -> bool:
        """Where asked for."""
        return self.offload

    @property
    def cuts_anywhere(self) -> str | None:
        """Where offloaded: pieces on the host."""
        return "offloaded weights lie on the host in pieces, which no rank gathers there" if self.offload else None

    def check(self, step: TrainingStep, mesh: MeshConfig, world_size: int) -> None:
        """Offloading is FSDP's."""
        require(
            not self.offload or mesh.fsdp is not None,
            "engine.offload",
            self.offload,
            "needs weights that are cut and gathered, and mesh.fsdp is null",
            f"Set mesh.fsdp to {mesh.ep} or a multiple of it that divides the ranks, or engine.offload to false.",
        )

    def build(
        self,
        model: nn.Module,
        mesh: Mesh,
        optimizer: torch.optim.Optimizer,
        gradients: GradientTable,
        step: TrainingStep,
    ) -> NativeEngine:
        """See the contract."""
        return NativeEngine(model, optimizer, gradients, step.clip_norm)


class NativeEngine:
    """See `moedist.engine.contract.Engine`.

    Where dense weights are whole, ranks meet for their gradients in `step`; where FSDP cuts them, in backward.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gradients: GradientTable,
        clip_norm: float | None,
    ):
        self.model, self.optimizer, self.gradients, self.clip_norm = model, optimizer, gradients, clip_norm
        # By the parameters that the optimizer knows; a module may show a gathered one in their place.
        self.name_of: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of this rank's share."""
        sum_replicas(self.model, now=last)
        loss.backward()

    def step(self, summed: Callable[[GradientOf], None] = lambda gradient_of: None) -> float:
        """Sum, norm, clip, update, clear."""
        self.gradients.sum_copies(self.model)
        summed(lambda parameter: parameter.grad)
        norm = self.gradients.norm(self.model).item()
        if math.isfinite(norm):
            if self.clip_norm is not None and norm > self.clip_norm:
                self.gradients.scale(self.model, self.clip_norm / norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def set_learning_rate(self, factor: float) -> None:
        """Sets every group to ``factor`` x its peak."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = factor * peak

    def learning_rates(self) -> dict[str, float]:
        """By group name; groups of one name share their rate."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def state(self) -> dict[str, Any]:
        """``model.<parameter>`` and ``optimizer.<parameter>.<moment>``."""
        if not self.optimizer.state:
            self._make_optimizer_state()
        moments = {
            self.name_of[parameter]: {key: in_full(value) for key, value in state.items()}
            for parameter, state in self.optimizer.state.items()
        }
        return {"model": self.model.state_dict(), "optimizer": moments}

    def restore(self, state: dict[str, Any], num_steps: int) -> None:
        """Takes over moments that the optimizer keeps in fewer bits; all other tensors are the live ones."""
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                given = state["optimizer"][self.name_of[parameter]][key]
                if given is not value:
                    local(value).copy_(local(given))

    def notes(self) -> Sequence[str]:
        """None."""
        return ()

    def settings(self) -> Mapping[str, Any] | None:
        """None: the configuration says all."""
        return None

    def close(self) -> None:
        """Nothing: axes hold groups by name only."""

    def _make_optimizer_state(self) -> None:
        """Optimizers make their moments at the first step; a load needs them before. A step with zero gradients at rate
        zero makes them and moves nothing."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self.optimizer.state.values():
            for value in state.values():
                local(value).copy_(torch.zeros_like(local(in_full(value))))


def in_full(value: Tensor) -> Tensor:
    """A moment as a checkpoint holds it: itself, or the numbers that a tensor of fewer bits (torchao's) stands for."""
    narrow = local(value)
    if not is_traceable_wrapper_subclass(narrow):
        return value
    wide: Tensor = narrow.dequantize(torch.float32)
    if not isinstance(value, DTensor):
        return wide
    return DTensor.from_local(
        wide, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value
