"""From a configuration to a model that lies spread over the ranks, with its first values."""

from __future__ import annotations

import dataclasses

import torch

from moedist.engine.contract import Engine
from moedist.mesh import Mesh
from moedist.model.attention.bank import Passes
from moedist.model.contract import LanguageModel
from moedist.model.init import init_weights
from moedist.model.size import ModelSize, model_size, train_flops_per_token
from moedist.parallel import GradientTable, compile_parts, keep_on_device, recompute_in_backward, spread
from moedist.train.config import RunConfig

PARAMETER_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Dtype of the weights; under ``bf16`` compute is cast, the weights stay fp32."""
MATMUL_DTYPES = {**PARAMETER_DTYPES, "bf16": torch.bfloat16}
"""Dtype of what matrices are multiplied with."""


@dataclasses.dataclass(frozen=True)
class SpreadModel:
    """A model on this rank.

    Attributes:
        model: with this rank's experts only.
        gradients: how each parameter lies over the ranks.
        size: of the whole model.
        flops_per_token: forward and backward of one token through the whole model.
    """

    model: LanguageModel
    gradients: GradientTable
    size: ModelSize
    flops_per_token: float


def build_model(config: RunConfig, vocab_size: int, mesh: Mesh) -> SpreadModel:
    """Builds without storage, keeps this rank's experts, then gives storage and values: no rank ever holds the whole.

    On a mesh whose device is ``meta`` (a dry run) it stays without storage and values.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    model = config.model.build(vocab_size, config.moe, device="meta", dtype=PARAMETER_DTYPES[config.train.precision])
    size = model_size(model)
    flops_per_token = train_flops_per_token(model, config.train.sequence_length)
    on_host = config.engine.weights_on_host and mesh.fsdp is not None
    gradients = spread(
        model,
        mesh,
        compute_dtype=torch.bfloat16 if config.train.precision == "bf16" else None,
        offload=on_host,
        passes=Passes(config.train.accumulation(mesh.dp.size), config.train.activation_checkpointing != "none"),
        alike=config.alike,
    )
    if mesh.device.type != "meta":
        model.to_empty(device="cpu" if on_host else mesh.device)
        init_weights(model, config.seed)
        if on_host:
            keep_on_device(model, mesh.device)
    if config.train.activation_checkpointing != "none":
        recompute_in_backward(model, config.train.activation_checkpointing)
    if config.train.compile == "blocks":
        compile_parts(model, whole_layers=not config.log.trace.on)
    return SpreadModel(model, gradients, size, flops_per_token)


def build_engine(config: RunConfig, spread: SpreadModel, mesh: Mesh) -> Engine:
    """The engine in charge of a spread model, with a new optimizer."""
    optimizer = config.train.optimizer.build(spread.model, spread.gradients)
    step = config.train.optimizer_step(mesh.dp.size)
    return config.engine.build(spread.model, mesh, optimizer, spread.gradients, step)


def autocast(config: RunConfig, mesh: Mesh) -> torch.autocast:
    """The context of every forward pass. Weights that are gathered in bf16 already need no casts."""
    narrow = config.train.precision == "bf16" and mesh.fsdp is None
    return torch.autocast(mesh.device.type, torch.bfloat16, enabled=narrow)
