"""Training with MoE layers in one's own loop: the loss, the optimizer's groups, a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moedist.config import Config, require
from moedist.model.attention.mixture import AttentionMixture
from moedist.moe.layer import MoE
from moedist.nn.losses import AuxLossModule
from moedist.parallel import clip_gradients
from moedist.train.optimizer.adamw import groups_by_role


class MoELoss(nn.Module):
    """``task_loss(prediction, target) + sum over layers of weight * aux_loss``; a weight acts here and nowhere else.

    Args:
        task_loss: 0-dim of a prediction and a target.
        aux_weight: of every layer's balance loss; None for each layer's own ``aux_loss_weight``.
        z_weight: of every layer's z-loss.
    """

    def __init__(
        self, task_loss: Callable[[Tensor, Tensor], Tensor], aux_weight: float | None = None, z_weight: float = 0.0
    ):
        super().__init__()
        for name, weight in (("aux_weight", aux_weight), ("z_weight", z_weight)):
            if weight is not None and not weight >= 0:
                raise ValueError(f"{name} = {weight} would reward imbalance: set it to 0 or more")
        self.task_loss, self.aux_weight, self.z_weight = task_loss, aux_weight, z_weight

    def forward(self, prediction: Tensor, target: Tensor, *layers: AuxLossModule) -> Tensor:
        """0-dim; ``layers`` have just computed ``prediction``."""
        total = self.task_loss(prediction, target)
        for layer in layers:
            weight = layer.aux_loss_weight if self.aux_weight is None else self.aux_weight
            total = total + weight * layer.aux_loss + self.z_weight * layer.z_loss
        return total


@dataclasses.dataclass(frozen=True)
class MoEOptimizerConfig(Config):
    """AdamW with a learning rate for each part of a model.

    Attributes:
        router_lr, experts_lr: of routers and routed experts.
        output_lr: of the projection behind attention experts, and of the module that is named as the output.
        other_lr: of all else.
        weight_decay: of matrices; norms and biases do not decay.
        max_norm: of the whole model's gradient; None for no clip.
    """

    router_lr: float = 1e-3
    experts_lr: float = 5e-4
    output_lr: float = 5e-4
    other_lr: float = 5e-4
    weight_decay: float = 1e-5
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for key in ("router_lr", "experts_lr", "output_lr", "other_lr", "weight_decay"):
            value = getattr(self, key)
            require(value >= 0, key, value, "is negative", "Set it to 0 or more.")
        require(self.max_norm is None or self.max_norm > 0, "max_norm", self.max_norm, "is no norm", "Set it above 0.")

    def build(self, model: nn.Module, output: nn.Module | None = None) -> torch.optim.AdamW:
        """The optimizer; after the model's experts are spread."""
        return torch.optim.AdamW(parameter_groups(model, self, output))


def parameter_groups(
    model: nn.Module, config: MoEOptimizerConfig, output: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Groups named ``router``, ``experts``, ``output`` and ``other``; every trainable parameter is in exactly one.

    Args:
        model: with MoE layers or mixtures of attention experts.
        config: the learning rates.
        output: the part of ``model`` that makes its output; None for none beside the mixtures' projections.
    """
    role_of = dict.fromkeys(model.parameters(), "other")
    role_of |= dict.fromkeys(() if output is None else output.parameters(), "output")
    for layer in model.modules():
        if isinstance(layer, MoE | AttentionMixture):
            role_of |= dict.fromkeys(layer.parameters(recurse=False), "output")
            role_of |= dict.fromkeys(layer.router.parameters(), "router")
            role_of |= dict.fromkeys(layer.bank.experts.parameters(), "experts")
    roles = {name: role_of[parameter] for name, parameter in model.named_parameters()}
    rates = {
        "router": config.router_lr,
        "experts": config.experts_lr,
        "output": config.output_lr,
        "other": config.other_lr,
    }
    return groups_by_role(model, roles, rates, config.weight_decay)


def training_step(
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    loss: MoELoss,
    optimizer: torch.optim.Optimizer,
    *,
    pool: Literal["none", "first", "mean"] = "none",
    max_norm: float | None = 1.0,
) -> float:
    """One step of training; returns the loss that it started from.

    Args:
        model: gives a tensor; every `AuxLossModule` in it joins the loss.
        inputs, target: of the batch.
        loss: task and balance together.
        optimizer: of the model's parameters.
        pool: what becomes of the positions [B, S, ...] of the prediction: all, the ``first``, or their ``mean``.
        max_norm: of the whole model's gradient, experts on other ranks included; None for no clip.
    """
    if not model.training:
        model.train()
    optimizer.zero_grad()
    prediction = model(inputs)
    if pool != "none":
        prediction = prediction[:, 0] if pool == "first" else prediction.mean(1)
    layers = [module for module in model.modules() if isinstance(module, AuxLossModule)]
    total = loss(prediction, target, *layers)
    total.backward()
    if max_norm is not None:
        clip_gradients(model, max_norm)
    optimizer.step()
    return total.item()
