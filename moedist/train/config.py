"""The whole configuration of a run: what `conf/` composes, `<run>/config.yaml` holds and every rank reads."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moedist.config import Config, require
from moedist.data.contract import DataConfig
from moedist.data.python_stdlib import PythonStdlibConfig
from moedist.engine.contract import EngineConfig, TrainingStep
from moedist.engine.native import NativeConfig
from moedist.log.config import LogConfig
from moedist.mesh import MeshConfig
from moedist.model.contract import ModelConfig
from moedist.model.decoder import DecoderConfig
from moedist.moe.layer import MoEConfig
from moedist.parallel.spread import FSDP_GATHERS
from moedist.train.optimizer.adamw import AdamWConfig
from moedist.train.optimizer.contract import OptimizerConfig
from moedist.train.schedule.contract import ScheduleConfig
from moedist.train.schedule.cosine import CosineConfig


@dataclasses.dataclass(frozen=True)
class RunFolder(Config):
    """Where a run keeps its things.

    Attributes:
        dir: the run folder; None for ``runs/<date>_<time>_<name>`` below the working directory.
        name: the run's name for people.
        resume: ``never``, ``auto`` (the same folder's latest verified checkpoint; used by restarts) or the path of a
            checkpoint or of another run's folder.
        allow_changes: dotted keys whose values may differ from the checkpoint's run.
    """

    dir: str | None = None
    name: str = "moedist"
    resume: str = "never"
    allow_changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LaunchConfig(Config):
    """How ranks are started.

    Attributes:
        nproc: ranks on this node; None for one per GPU, or one per core up to 4 where there is none.
        nnodes: number of nodes; more than one can only be started with ``rendezvous``.
        rendezvous: host:port that all nodes can reach; None on a single node.
        local_addr: address by which other nodes reach this one; None for the one from which packets to the rendezvous
            leave.
        holds_rendezvous: whether the ranks meet on this node; None for whether it has the rendezvous' address. Nodes
            that share a machine must say it.
        meet_within_s: seconds that a node waits for the others, at the start and after a failure.
        threads: OMP threads of each rank; None for cores / ranks.
        max_restarts: how often a failed group of ranks is started again from its last good checkpoint.
        stop_after_s: seconds that ranks get to save and leave after a signal before they are killed.
    """

    nproc: int | None = None
    nnodes: int = 1
    rendezvous: str | None = None
    local_addr: str | None = None
    holds_rendezvous: bool | None = None
    meet_within_s: float = 600.0
    threads: int | None = None
    max_restarts: int = 0
    stop_after_s: float = 25.0

    def __post_init__(self) -> None:
        require(
            self.nproc is None or self.nproc >= 1, "nproc", self.nproc, "is not a number of ranks", "Set 1 or more."
        )
        require(self.nnodes >= 1, "nnodes", self.nnodes, "is not a number of nodes", "Set it to 1 or more.")
        require(
            self.threads is None or self.threads >= 1, "threads", self.threads, "is no thread count", "Set 1 or more."
        )
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "is negative", "Set it to 0 or more.")
        for key in ("meet_within_s", "stop_after_s"):
            value = getattr(self, key)
            require(value > 0, key, value, "is not a duration", "Set it to a positive number of seconds.")

    def check_start(self) -> None:
        """Raises `ConfigError` where ranks could not be started so; a plan of them needs less."""
        require(
            self.nnodes == 1 or self.rendezvous is not None,
            "rendezvous",
            self.rendezvous,
            f"says no meeting point for {self.nnodes} nodes",
            "Set launch.rendezvous to a host:port of the first node that all nodes can reach.",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """The loop.

    Attributes:
        steps: optimizer steps of the whole run.
        sequence_length: positions per row (S).
        micro_batch: rows per rank and micro-step (B).
        global_batch_tokens: positions per optimizer step over all ranks; accumulation is derived from it. None for
            one micro-step.
        precision: ``fp32``, ``bf16`` (autocast; weights, router and losses stay fp32) or ``fp64`` (proofs).
        activation_checkpointing: what backward computes again inside attentions and banks of experts: ``none``,
            ``full`` (all of it, exchanges of rows included) or ``selective`` (all but matrix products, attention
            scores and exchanges). The router, the capacity plan and the losses are never computed again.
        compile: ``none``, or ``blocks``: attentions, dense feed-forward layers and routers become graphs of
            torch.compile at their first step, and with ``moe/dispatch=padded`` whole MoE layers. Needs a C++ compiler.
        clip_norm: largest norm of the whole model's gradient; None for no clip.
        log_every, eval_every, checkpoint_every: steps between them; None for never. A run ends with a last log record,
            a last evaluation and a last checkpoint where they are on.
        eval_batches: micro-steps of one evaluation over all ranks; None for the whole held-out part.
        optimizer: the update rule and its learning rates.
        schedule: how learning rates follow the step.
    """

    steps: int = 1000
    sequence_length: int = 256
    micro_batch: int = 8
    global_batch_tokens: int | None = None
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    compile: Literal["none", "blocks"] = "none"
    clip_norm: float | None = 1.0
    log_every: int | None = 10
    eval_every: int | None = 200
    checkpoint_every: int | None = 500
    eval_batches: int | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=CosineConfig)

    def __post_init__(self) -> None:
        for key in ("steps", "sequence_length", "micro_batch"):
            value = getattr(self, key)
            require(value >= 1, key, value, "is too small", "Set it to 1 or more.")
        for key in ("global_batch_tokens", "log_every", "eval_every", "checkpoint_every", "eval_batches", "clip_norm"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "is too small", "Set it above 0, or to null for none.")

    def accumulation(self, world_size: int) -> int:
        """Micro-steps per optimizer step on ``world_size`` ranks.

        Raises:
            ConfigError: the global batch is not a whole number of micro-steps.
        """
        per_micro_step = world_size * self.micro_batch * self.sequence_length
        if self.global_batch_tokens is None:
            return 1
        count, rest = divmod(self.global_batch_tokens, per_micro_step)
        require(
            count >= 1 and rest == 0,
            "global_batch_tokens",
            self.global_batch_tokens,
            f"is no multiple of the {per_micro_step} tokens of one micro-step ({world_size} ranks x {self.micro_batch} "
            f"rows x {self.sequence_length} positions)",
            "Set train.global_batch_tokens to "
            + " or ".join(str(near * per_micro_step) for near in (count, count + 1) if near > 0)
            + ("." if count > 0 else ", or train.micro_batch or train.sequence_length lower."),
        )
        return count

    def optimizer_step(self, world_size: int) -> TrainingStep:
        """What an engine must know of the loop on ``world_size`` ranks.

        Raises:
            ConfigError: the global batch is not a whole number of micro-steps.
        """
        return TrainingStep(
            micro_batch=self.micro_batch,
            accumulation=self.accumulation(world_size),
            precision=self.precision,
            clip_norm=self.clip_norm,
            num_steps=self.steps,
            warmup_steps=self.schedule.warmup_steps,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Config):
    """What is kept.

    Attributes:
        keep: number of newest verified checkpoints to keep; None for all.
        on_failure: what a failed save does: ``abort`` the run (exit 4, last good checkpoint intact) or ``warn`` and go
            on.
        background: copy the state to host memory and write it while training goes on, instead of waiting for the disk.
            Costs host memory of the size of each rank's part of the state.
    """

    keep: int | None = 2
    on_failure: Literal["abort", "warn"] = "abort"
    background: bool = False

    def __post_init__(self) -> None:
        require(
            self.keep is None or self.keep >= 1, "keep", self.keep, "keeps nothing", "Set 1 or more, or null for all."
        )


@dataclasses.dataclass(frozen=True)
class RunConfig(Config):
    """One run, whole.

    Attributes:
        seed: of the initial model, the order of samples and all noise.
        plugins: packages that hold further choices under the paths of this one (``my_package.moe.router.mine``).
    """

    seed: int = 0
    plugins: tuple[str, ...] = ()
    run: RunFolder = dataclasses.field(default_factory=RunFolder)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=PythonStdlibConfig)
    model: ModelConfig = dataclasses.field(default_factory=DecoderConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    engine: EngineConfig = dataclasses.field(default_factory=NativeConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def alike(self) -> str | None:
        """Why all ranks must have the same parameters beside the experts of MoE layers; None where they need not."""
        return FSDP_GATHERS if self.mesh.fsdp is not None else self.engine.alike

    def ranks_per_node(self, world_size: int) -> int:
        """Ranks that share a node where ``launch`` starts ``world_size`` of them."""
        return self.mesh.ranks_per_node or world_size // self.launch.nnodes
