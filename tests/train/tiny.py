"""Runs small enough for a test: a decoder of three blocks on documents that count, in milliseconds per step."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from moedist.data.contract import Source
from moedist.data.synthetic import SyntheticConfig
from moedist.log.config import LogConfig
from moedist.log.sink.jsonl import JsonlConfig
from moedist.mesh import Axis, Mesh, MeshConfig
from moedist.model.attention.gqa import GQAConfig
from moedist.model.decoder import DecoderConfig
from moedist.model.ffn.dense import DenseConfig
from moedist.model.layers.interleaved import InterleavedConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.router.topk import TopKConfig
from moedist.train.build import build_model
from moedist.train.checkpoint import CheckpointStore
from moedist.train.config import RunConfig, RunFolder, TrainConfig
from moedist.train.optimizer.adamw import AdamWConfig
from moedist.train.schedule.cosine import CosineConfig
from moedist.train.trainer import Progress, Trainer
from tests.rows import of_no_clock, read_rows

ROWS, LENGTH = 2, 16

# Dropping is on (factor 1), noise is on, and the balance loss is one that no cut into ranks changes.
CONFIG = RunConfig(
    seed=5,
    data=SyntheticConfig(vocab_size=37, num_tokens=1500, document_length=12, jump_rate=0.2),
    model=DecoderConfig(
        dim=16,
        attention=GQAConfig(num_heads=2),
        ffn=DenseConfig(hidden_dim=24),
        layers=InterleavedConfig(num_layers=3, first_dense=1),
    ),
    moe=MoEConfig(
        num_experts=8,
        router=TopKConfig(top_k=2, noise_std=0.3),
        capacity=CapacityConfig(factor=1.0),
        experts=LoopConfig(hidden_dim=12),
        balance={"switch": SwitchConfig(0.3, "micro_batch"), "z_loss": ZLossConfig(0.1)},
    ),
    train=TrainConfig(
        steps=20,
        sequence_length=LENGTH,
        micro_batch=ROWS,
        precision="fp64",
        clip_norm=0.5,
        log_every=1,
        eval_every=None,
        checkpoint_every=20,
        optimizer=AdamWConfig(router_lr=1e-2, experts_lr=1e-2, other_lr=1e-2, weight_decay=0.1),
        schedule=CosineConfig(warmup_steps=3),
    ),
    log=LogConfig(sinks={"jsonl": JsonlConfig()}),
)


def changed(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    """``config`` with other values: ``changed(config, train={"steps": 3}, capacity={"factor": 0.5})``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # factors below 1 are the point of some tests
        capacity = dataclasses.replace(config.moe.capacity, **parts.pop("capacity", {}))
        moe = dataclasses.replace(config.moe, capacity=capacity, **parts.pop("moe", {}))
        others = {name: dataclasses.replace(getattr(config, name), **values) for name, values in parts.items()}
        return dataclasses.replace(config, moe=moe, **others)


def in_folder(config: RunConfig, folder: Path, ep: int = 1, resume: str = "never") -> RunConfig:
    """``config`` for a run in ``folder`` at ``ep``."""
    return dataclasses.replace(config, run=RunFolder(dir=str(folder), resume=resume), mesh=MeshConfig(ep=ep))


def make_trainer(
    config: RunConfig, source: Source, mesh: Mesh, folder: Path | None = None, traces: Path | None = None
) -> Trainer:
    """A trainer outside a run: nobody stops it or watches it; it saves below ``folder`` and records to ``traces``."""
    store = CheckpointStore(folder, mesh.dp) if folder is not None else None
    stop, watchdog = SimpleNamespace(requested=False), SimpleNamespace(enter=lambda *_: None)
    spread = build_model(config, source.vocab_size, mesh)
    progress = Progress("0" * 8)
    return Trainer(config, mesh, source, spread, store, stop, watchdog, progress, {}, traces)  # type: ignore[arg-type]


def no_measuring() -> AbstractContextManager[object]:
    """Runs inside take the machine's peak FLOP/s as given, which saves more time than their steps take."""
    return mock.patch("moedist.train.measures.measured_peak_flops", lambda *_: 1e9)


def rows_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The metrics of a run by step, those that no clock decides; of a replayed step the last one."""
    return {row["train/step"]: of_no_clock(row) for row in read_rows(run_dir)}


def digest_of(config: RunConfig, checkpoint: Path) -> str:
    """SHA-256 of every parameter, optimizer moment and counter in a checkpoint, whole and by name, whatever layout
    wrote it."""
    trainer = make_trainer(config, config.data.open(), Mesh.alone())
    state = trainer.state()
    CheckpointStore(checkpoint.parent, Axis("dp")).load(checkpoint, state)
    digest = hashlib.sha256()
    for name, tensor in sorted(leaves(state)):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def leaves(state: dict[str, Any], prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    """The tensors of a nested mapping by dotted names; 0-dim ones as [1]."""
    found = []
    for key, value in state.items():
        name = f"{prefix}{key}"
        found += leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value.detach().reshape(-1))]
    return found
