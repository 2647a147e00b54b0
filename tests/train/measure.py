"""Steps of the real trainer and what became of every parameter: what layouts and engines are compared by."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moedist.mesh import Mesh
from moedist.moe.bank.local import LocalConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.train.config import RunConfig
from moedist.train.trainer import Trainer
from tests.train.tiny import LENGTH, ROWS, changed, make_trainer

WORLD = 4


@dataclasses.dataclass
class Steps:
    """First values, the first step's gradients before the clip, each step's loss and norm, last values; all whole."""

    first: dict[str, Tensor]
    grads: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    last: dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    """A copy of the values of all ranks' pieces."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def on_global_batch(config: RunConfig, accumulation: int) -> RunConfig:
    """``accumulation`` micro-steps of 4 ranks, or of one device the four-fold: the same cut into capacity groups."""
    return changed(config, train={"global_batch_tokens": WORLD * accumulation * ROWS * LENGTH})


def run_steps(trainer: Trainer, steps: int) -> Steps:
    """Runs them on the native engine."""
    found = Steps({name: whole(value) for name, value in trainer.model.named_parameters()}, {}, [], [], {})
    table = trainer.engine.gradients
    norm_of = table.norm

    def norm(model: nn.Module) -> Tensor:
        if not found.grads:  # summed, and not clipped yet
            found.grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        return norm_of(model)

    object.__setattr__(table, "norm", norm)
    loader = trainer.loader()
    for _ in range(steps):
        assert trainer.step(loader)
        found.losses.append(trainer.tally.reduce(trainer.mesh.dp).loss)
        found.norms.append(trainer.grad_norm)
    object.__setattr__(table, "norm", norm_of)
    found.last = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    return found


def on_one_device(config: RunConfig, steps: int) -> Steps:
    """The reference: one process with the obvious twins."""
    hidden_dim = config.moe.experts.hidden_dim
    plain = changed(config, moe={"bank": LocalConfig(), "experts": LoopConfig(hidden_dim=hidden_dim)})
    return run_steps(make_trainer(plain, config.data.open(), Mesh.alone()), steps)


def worst_gradient(got: Steps, expected: Steps) -> float:
    """Largest difference of a gradient's entry, as a share of that gradient's largest entry."""
    return max(
        ((got.grads[name] - grad).abs().max() / grad.abs().max().clamp_min(torch.finfo(grad.dtype).tiny)).item()
        for name, grad in expected.grads.items()
    )


def worst_loss(got: Steps, expected: Steps) -> float:
    """Largest difference of a step's loss, in nats per token."""
    return max(abs(one - other) for one, other in zip(got.losses, expected.losses, strict=True))


def worst_norm(got: Steps, expected: Steps) -> float:
    """Largest difference of a step's norm before the clip, as a share of it."""
    return max(abs(one - other) / other for one, other in zip(got.norms, expected.norms, strict=True))
