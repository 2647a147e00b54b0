"""What the closed forms must know of a configuration: numbers of parameters by part, sizes, and the layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch

from moedist.config import require
from moedist.engine.deepspeed import DeepSpeedConfig
from moedist.model.attention.contract import AttentionConfig
from moedist.model.decoder import DecoderConfig
from moedist.model.ffn.contract import FFNConfig
from moedist.model.ffn.moe import MoEFFNConfig
from moedist.model.size import ModelSize, model_size, train_flops_per_token
from moedist.moe.layer import MoE, MoEConfig
from moedist.train.build import PARAMETER_DTYPES
from moedist.train.config import RunConfig
from moedist.train.optimizer.contract import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of a part of the whole model.

    Attributes:
        other: of dense weights, norms included.
        router: of routers.
        experts: of all routed experts.
        largest: of the largest tensor outside of the experts.
        largest_experts: of the largest stacked tensor of experts.
    """

    other: int = 0
    router: int = 0
    experts: int = 0
    largest: int = 0
    largest_experts: int = 0

    def __add__(self, more: Count) -> Count:
        return Count(
            self.other + more.other,
            self.router + more.router,
            self.experts + more.experts,
            max(self.largest, more.largest),
            max(self.largest_experts, more.largest_experts),
        )


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """One block: its parts, the parameters of each half, and its MoE layer where it has one."""

    attention: AttentionConfig
    ffn: FFNConfig
    moe: MoEConfig | None
    attention_count: Count
    ffn_count: Count

    @property
    def count(self) -> Count:
        """Of both halves."""
        return self.attention_count + self.ffn_count


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        dim, vocab_size: D, V.
        blocks: from the input to the output.
        embedding: the input's table, where the head has its own.
        head: the last norm and the head; with tied embeddings the one table.
        size, flops_per_token: as `moedist.model.size`; the FLOPs are those of training, at the run's row length.
        score_flops: of one token's forward pass through the attention of each block, beside its matrices.
    """

    dim: int
    vocab_size: int
    blocks: tuple[BlockShape, ...]
    embedding: Count
    head: Count
    size: ModelSize
    flops_per_token: float
    score_flops: tuple[float, ...]

    @property
    def count(self) -> Count:
        """Of the whole model."""
        return sum((block.count for block in self.blocks), self.embedding + self.head)

    @property
    def matrices(self) -> Count:
        """Of the blocks without their routers: matrices, and norms that count for nothing beside them."""
        return dataclasses.replace(sum((block.count for block in self.blocks), Count()), router=0)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with a MoE layer."""
        return tuple(index for index, block in enumerate(self.blocks) if block.moe is not None)


def shape_of(config: RunConfig, vocab_size: int) -> ModelShape:
    """Counts a configuration's model, built without storage.

    Raises:
        ConfigError: the model is none that the closed forms know.
    """
    require(
        isinstance(config.model, DecoderConfig),
        "model.kind",
        config.model.kind,
        "has no closed form: estimate knows decoders",
        "Set model=decoder; the dry run of `moedist train --dry-run` counts weights of any model.",
    )
    assert isinstance(config.model, DecoderConfig)
    dtype = PARAMETER_DTYPES[config.train.precision]
    model = config.model.build(vocab_size, config.moe, device="meta", dtype=dtype)
    specs, length = config.model.blocks(), config.train.sequence_length
    blocks, score_flops = [], []
    for index, (spec, block) in enumerate(zip(specs, model.blocks, strict=True)):
        assert spec.attention is not None and spec.ffn is not None
        counts = {
            name: sum((_count(block, child) for child in names), Count())
            for name, names in {"attention": ("attention_norm", "attention"), "ffn": ("ffn_norm", "ffn")}.items()
        }
        moe = (spec.ffn.moe or config.moe) if isinstance(spec.ffn, MoEFFNConfig) else None
        blocks.append(BlockShape(spec.attention, spec.ffn, moe, counts["attention"], counts["ffn"]))
        score_flops.append(model.blocks[index].attention.score_flops(length))  # type: ignore[union-attr, operator]
    table = _count(model, "embedding")
    rest = _count(model, "norm") + (table if model.head is None else _count(model, "head"))
    return ModelShape(
        dim=config.model.dim,
        vocab_size=vocab_size,
        blocks=tuple(blocks),
        embedding=Count() if model.head is None else table,
        head=rest,
        size=model_size(model),
        flops_per_token=train_flops_per_token(model, length),
        score_flops=tuple(score_flops),
    )


def _count(parent: torch.nn.Module, child: str) -> Count:
    """The parameters of a child module."""
    module = parent.get_submodule(child)
    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    routers = {p for layer in layers for p in layer.router.parameters()}
    experts = {p for layer in layers for p in layer.bank.experts.parameters()}
    others = [p for p in module.parameters() if p not in routers | experts]

    def total(parameters: Iterator[torch.nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    return Count(
        other=total(iter(others)),
        router=total(iter(routers)),
        experts=total(iter(experts)),
        largest=max((p.numel() for p in others), default=0),
        largest_experts=max((p.numel() for p in experts), default=0),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the run is cut into ranks and micro-steps.

    Attributes:
        world: all ranks.
        ep, fsdp: as `moedist.mesh.MeshConfig`.
        zero_stage: of DeepSpeed; None where another engine runs.
        offload: whether what FSDP cuts lies on the host.
        micro_batch, length: rows per rank and micro-step (B), positions per row (S).
        accumulation: micro-steps per step.
        checkpointing: ``none``, ``full`` or ``selective``.
        precision: ``fp32``, ``bf16`` or ``fp64``.
        device: ``cuda`` or ``cpu``.
        optimizer: the update rule.
    """

    world: int
    ep: int
    fsdp: int | None
    zero_stage: int | None
    offload: bool
    micro_batch: int
    length: int
    accumulation: int
    checkpointing: Literal["none", "full", "selective"]
    precision: Literal["fp32", "bf16", "fp64"]
    device: Literal["cuda", "cpu"]
    optimizer: OptimizerConfig

    @classmethod
    def of(cls, config: RunConfig, world: int, device: Literal["cuda", "cpu"]) -> Layout:
        """Of a configuration on ``world`` ranks.

        Raises:
            ConfigError: the global batch is not a whole number of micro-steps.
        """
        train = config.train
        zero_stage = None
        if isinstance(config.engine, DeepSpeedConfig):
            zero_stage = config.engine.merged(train.optimizer_step(world), world).stage
        return cls(
            world=world,
            ep=config.mesh.ep,
            fsdp=config.mesh.fsdp,
            zero_stage=zero_stage,
            offload=config.engine.weights_on_host and config.mesh.fsdp is not None,
            micro_batch=train.micro_batch,
            length=train.sequence_length,
            accumulation=train.accumulation(world),
            checkpointing=train.activation_checkpointing,
            precision=train.precision,
            device=device,
            optimizer=train.optimizer,
        )

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch on a rank (T)."""
        return self.micro_batch * self.length

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.ep

    @property
    def weight_size(self) -> int:
        """Bytes of one weight, of its gradient and of each moment."""
        return 8 if self.precision == "fp64" else 4

    @property
    def compute_size(self) -> int:
        """Bytes of one number in matrix products and in exchanged rows."""
        return {"fp32": 4, "bf16": 2, "fp64": 8}[self.precision]

    @property
    def casts(self) -> bool:
        """Whether autocast makes narrow copies of wide weights and activations; FSDP gathers narrow ones instead."""
        return self.precision == "bf16" and self.fsdp is None

    @property
    def residual_size(self) -> int:
        """Bytes of one number of the residual stream."""
        return self.weight_size if self.casts else self.compute_size

    def held(self, count: Count) -> int:
        """Parameters of a part that lie on a rank."""
        dense = count.other + count.router
        if self.fsdp is None:
            return dense + count.experts // self.ep
        return -(-dense // self.fsdp) + -(-count.experts // self.fsdp)

    def updated(self, count: Count) -> int:
        """Parameters of a part that a rank's optimizer updates."""
        if not self.zero_stage:
            return self.held(count)
        return -(-(count.other + count.router) // self.world) + -(-count.experts // (self.ep * self.edp))

    def gathered(self, count: Count) -> int:
        """Parameters of a part whose whole rank's share computes: dense ones, and this rank's experts."""
        return count.other + count.router + count.experts // self.ep


def ranks_of(config: RunConfig, default: int = 1) -> int:
    """All ranks that a configuration asks for; ``default`` per node where it leaves them to the machine."""
    return (config.launch.nproc or default) * config.launch.nnodes
