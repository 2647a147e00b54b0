"""One full training step on tensors without storage, and what lives at its worst moment: the check of the closed forms.

The modules, the engine and the optimizer are those of a run; the process groups send nothing (`moedist.mesh.fake`), the
tensors are torch's fake ones, and torch's memory tracker counts them. So a rank of any world runs on a laptop, and a
step of a model of any size needs a few seconds and no memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moedist.config import require
from moedist.engine.contract import Engine
from moedist.engine.native import NativeConfig
from moedist.mesh import Mesh
from moedist.mesh.fake import fake_mesh
from moedist.model.batch import TokenBatch
from moedist.model.contract import LanguageModel, StepContext
from moedist.model.loss import token_loss
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.report import StepCounts, pack_reports
from moedist.parallel.fully_shard import units_of
from moedist.train.build import autocast, build_engine, build_model
from moedist.train.config import RunConfig
from moedist.train.spill import may_spill

NORM = 2.0
"""What the host reads for every wide number: a gradient norm that makes the engine clip."""


@dataclasses.dataclass(frozen=True)
class FakeRun:
    """What torch's memory tracker saw.

    Attributes:
        peak: most bytes of live tensors at one time of the step.
        parts: of it, by the tracker's kinds (Parameter, Gradient, Activation, Temp, Optstate, ...).
    """

    peak: int
    parts: dict[str, int]


def fake_run(config: RunConfig, vocab_size: int, world_size: int, *, rank: int = 0) -> FakeRun:
    """One step of one rank, in a process that is in no process group; even routing.

    Computed as on a CPU, whose attention and norms keep other tensors than a GPU's. What the host would read from the
    device is replaced: every integer by the even share of pairs per expert, so that rows are spread evenly.

    Args:
        config: checked for ``world_size`` ranks.
        vocab_size: number of token ids (V).
        world_size: all ranks.
        rank: which one.

    Raises:
        ConfigError: an engine that builds nothing without its ranks, weights on the host, which is where all fakes
            are, or a dispatcher that tells the host other numbers than those of pairs.
    """
    require(
        isinstance(config.engine, NativeConfig) and not config.engine.offload,
        "engine",
        config.engine.kind,
        "cannot run on fakes: DeepSpeed needs its ranks, and offloading a device beside the host",
        "Set engine=native and engine.offload=false, or leave --fake-run out.",
    )
    require(
        not isinstance(config.moe.dispatch, HierarchicalConfig),
        "moe.dispatch.kind",
        config.moe.dispatch.kind,
        "cannot run on fakes: the host reads numbers of rows that no even share stands for",
        "Set moe/dispatch=all_to_all, whose rows at experts are the same, or leave --fake-run out.",
    )
    train = config.train
    pairs = train.micro_batch * train.sequence_length * config.moe.router.experts_per_token(config.moe.num_experts)
    with fake_mesh(config.mesh, rank, world_size) as nowhere:
        spread = build_model(config, vocab_size, nowhere)
        mesh = dataclasses.replace(nowhere, device=torch.device("cpu"))
        with FakeTensorMode(), HostReads(pairs // config.moe.num_experts):
            give_storage(spread.model)
            gradients = dataclasses.replace(spread.gradients, device=mesh.device)
            engine = build_engine(config, dataclasses.replace(spread, gradients=gradients), mesh)
            moments = list(_tensors(engine.state()["optimizer"]))
            tracker = MemTracker()
            tracker.track_external(spread.model, *moments)
            with tracker:
                run_step(config, spread.model, engine, mesh, tracker.reset_mod_stats)
            engine.close()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    parts = {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}
    return FakeRun(parts.pop("Total"), parts)


class HostReads(TorchDispatchMode):
    """What fake tensors cannot do: give a value to the host, and a grouped matrix product in fp32 (torch's own rule of
    shapes refuses that, while the kernel on a CPU does it)."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces two operators."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return NORM if args[0].is_floating_point() else self.count
        if func is torch.ops.aten._grouped_mm.default:
            a, b = args[0], args[1]
            if a.dim() == b.dim() == 2:
                return a.new_empty(args[2].shape[0], a.shape[0], b.shape[1])
            return a.new_empty(a.shape[0], b.shape[2])
        return func(*args, **(kwargs or {}))


def give_storage(model: LanguageModel) -> None:
    """Replaces parameters and buffers on the meta device by fakes on the CPU."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _empty_like(buffer)
    for unit in units_of(model):
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            for sharded in group.fsdp_params:
                sharded.reset_sharded_param()


def _empty_like(tensor: Tensor) -> Tensor:
    """On the CPU, by the shapes alone: a fake mode takes no tensor from outside."""
    if not isinstance(tensor, DTensor):
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
    local = torch.empty(tuple(tensor._local_tensor.shape), dtype=tensor.dtype)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


def run_step(config: RunConfig, model: LanguageModel, engine: Engine, mesh: Mesh, forget: Callable[[], None]) -> None:
    """One optimizer step, as `moedist.train.trainer.Trainer.step` makes it: at most two micro-steps, after which none
    holds more than the one before.

    Args:
        forget: called before each micro-step: the tracker keeps one forward pass of each module apart.
    """
    num_micro_steps = min(config.train.accumulation(mesh.dp.size), 2)
    batches = [_batch(config) for _ in range(num_micro_steps)]
    num_tokens = sum(batch.token_BS.numel() for batch in batches) * mesh.dp.size
    context = StepContext(
        seed=config.seed,
        step=torch.zeros((), dtype=torch.int64),
        num_tokens=torch.tensor(num_tokens),
        training=True,
        may_spill=may_spill(model),
    )
    counts = StepCounts()
    for place, batch in enumerate(batches, start=1):
        forget()
        with autocast(config, mesh):
            output = model(batch, dataclasses.replace(context, counts=counts))
            loss = token_loss(output, batch.target_BS) / num_tokens
            if output.reports:
                loss = loss + pack_reports(output.reports).objective()
        counts = counts.after(output.reports)
        del output
        engine.backward(loss, last=place == num_micro_steps)
    engine.step()


def _batch(config: RunConfig) -> TokenBatch:
    """Full rows of one document each."""
    rows, length = config.train.micro_batch, config.train.sequence_length
    ids_BS = torch.zeros(rows, length, dtype=torch.int64)
    return TokenBatch(
        token_BS=ids_BS,
        target_BS=ids_BS,
        position_BS=torch.arange(length).expand(rows, length),
        document_BS=None,
        valid_BS=torch.ones(rows, length, dtype=torch.bool),
        sample_B=torch.arange(rows),
    )
