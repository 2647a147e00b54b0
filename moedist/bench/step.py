"""A whole training step of a configuration in this process: its phases, its tokens per second, a trace; and the same
model dense, step by step in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moedist.bench.rounds import ratio, sample
from moedist.config import require
from moedist.data.check import open_data
from moedist.data.loader import Loader
from moedist.mesh import Axis, Mesh
from moedist.model.decoder import DecoderConfig
from moedist.model.ffn.dense import DenseConfig
from moedist.model.layers.listed import ListedConfig
from moedist.moe.ffn import FFNExpertsConfig
from moedist.moe.layer import routing_label
from moedist.train.build import build_model
from moedist.train.checkpoint import CheckpointStore
from moedist.train.config import RunConfig
from moedist.train.evaluate import evaluate
from moedist.train.signals import StopRequest
from moedist.train.throughput import peak_memory
from moedist.train.trainer import Progress, Trainer
from moedist.train.watchdog import Watchdog

WARM_UP = 3
"""Steps that are not counted."""
TRACED = 3
"""Steps in a trace."""
LIMIT_S = 3600.0
"""Seconds that a step of one process may take on a busy machine."""


@contextlib.contextmanager
def trainer_of(config: RunConfig, folder: Path, device: torch.device) -> Iterator[tuple[Trainer, Loader]]:
    """A run without sinks and without an end, all of it in this process."""
    mesh, source = Mesh.alone(device), open_data(config.data)
    torch.manual_seed(config.seed)
    spread = build_model(config, source.vocab_size, mesh)
    store = CheckpointStore(folder / "checkpoints", Axis("slow"))
    with StopRequest() as stop, Watchdog(folder / "logs", 0, LIMIT_S) as watchdog:
        trainer = Trainer(config, mesh, source, spread, store, stop, watchdog, Progress("bench000", "bench000"), {})
        trainer.model.train()
        with contextlib.closing(trainer.engine):
            yield trainer, trainer.loader()


def timed(trainer: Trainer, loader: Loader) -> float:
    """Seconds of the next step."""
    begin = time.perf_counter()
    trainer.take_step(loader)
    if trainer.mesh.device.type == "cuda":
        torch.cuda.synchronize(trainer.mesh.device)
    return time.perf_counter() - begin


def measure_step(
    config: RunConfig, folder: Path, steps: int, device: torch.device, trace: Path | None = None
) -> dict[str, Any]:
    """Steps of a run, phase by phase.

    Args:
        config: a run's; its experts stay in one process.
        folder: for what the trainer writes.
        steps: that count.
        device: of the process.
        trace: a file for torch's profile of `TRACED` further steps, as Perfetto reads it; None for none.
    """
    with trainer_of(config, folder, device) as (trainer, loader):
        trainer.measures.measure_peak()
        seconds, phases = [], defaultdict[str, list[float]](list)
        for turn in range(WARM_UP + steps):
            trainer.phases.begin()
            took = timed(trainer, loader)
            (spans,) = trainer.phases.end()
            if turn < WARM_UP:
                continue
            seconds.append(took)
            for phase in dict.fromkeys(span.phase for span in spans):
                phases[phase].append(sum(span.end_s - span.begin_s for span in spans if span.phase == phase))
        if trace is not None:
            write_trace(trace, lambda: timed(trainer, loader))
        step = sample(seconds)
        tokens = trainer.progress.tokens / trainer.progress.step
        flops = tokens * trainer.spread.flops_per_token / step.median
        return {
            "step_ms": 1e3 * step.median,
            "spread": step.spread,
            "quotable": step.quotable,
            "tokens_per_s": tokens / step.median,
            "gflop_per_s": flops / 1e9,
            "mfu": flops / trainer.measures.peak_flops if trainer.measures.peak_flops else math.nan,
            "phases_ms": {phase: 1e3 * sample(values).median for phase, values in phases.items()},
            "peak_gib": peak_memory(device) / 2**30,
            "routing": routing_label(trainer.model) or "natural",
        }


def write_trace(path: Path, step: Callable[[], object]) -> None:
    """What every operation of some steps took, for Perfetto or chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile

    require(not path.exists(), "--profile", str(path), "is there already", "Name a file that is not there yet.")
    on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *on_cuda]) as profiler:
        for _ in range(TRACED):
            step()
    profiler.export_chrome_trace(str(path))


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a model stands after some steps: what it has cost, and its held-out loss."""

    step: int
    tokens: float
    flops: float
    seconds: float
    loss: float


def dense_twin(config: RunConfig) -> RunConfig:
    """The same run with a dense layer in the place of every MoE layer, as wide as the experts that a token meets.

    Active parameters then differ by the routers alone.

    Raises:
        ConfigError: the model has no such twin.
    """
    model, moe = config.model, config.moe
    experts = moe.experts
    can = isinstance(model, DecoderConfig) and isinstance(experts, FFNExpertsConfig) and moe.shared_hidden_dim is None
    require(can, "model", config.model.kind, "has no dense twin of one width", "Choose a decoder with FFN experts.")
    assert isinstance(model, DecoderConfig) and isinstance(experts, FFNExpertsConfig)
    width = moe.router.experts_per_token(moe.num_experts) * experts.width(model.dim)
    dense = DenseConfig(hidden_dim=width, activation=experts.activation)
    blocks = tuple(
        spec if spec.ffn is None or spec.ffn.kind != "moe" else dataclasses.replace(spec, ffn=dense)
        for spec in model.layers.specs()
    )
    return dataclasses.replace(config, model=dataclasses.replace(model, layers=ListedConfig(blocks=blocks)))


def compare_with_dense(
    config: RunConfig, folder: Path, steps: int, evaluations: int, device: torch.device
) -> dict[str, Any]:
    """Trains a model and its dense twin from step 0, a step of one and a step of the other, on the same data.

    Args:
        config: the MoE model's.
        folder: for what trainers write.
        steps: of each.
        evaluations: how often both are measured on the held-out part, the last time at the end.
        device: of the process.
    """
    every = max(1, steps // evaluations)
    with (
        trainer_of(config, folder / "moe", device) as moe,
        trainer_of(dense_twin(config), folder / "dense", device) as dense,
    ):
        sides = {"moe": moe, "dense": dense}
        took: dict[str, list[float]] = {"moe": [], "dense": []}
        points: dict[str, list[Point]] = {"moe": [], "dense": []}
        for step in range(1, steps + 1):
            for side in ("moe", "dense") if step % 2 else ("dense", "moe"):
                trainer, loader = sides[side]
                took[side].append(timed(trainer, loader))
            if step % every and step != steps:
                continue
            for side, (trainer, _) in sides.items():
                loss = evaluate(trainer.model, trainer.source, trainer.config, trainer.mesh, step)
                trainer.model.train()
                tokens = trainer.progress.tokens
                flops = tokens * trainer.spread.flops_per_token
                points[side].append(Point(step, tokens, flops, sum(took[side]), loss))
        sizes = {side: trainer.spread.size for side, (trainer, _) in sides.items()}
        tokens_per_step = moe[0].progress.tokens / steps
        label = routing_label(moe[0].model) or "natural"
    warm = {side: values[WARM_UP:] for side, values in took.items()}
    speed = ratio(warm["dense"], warm["moe"])
    return {
        "routing": label,
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "total_parameters": {side: size.total for side, size in sizes.items()},
        "active_parameters": {side: size.active for side, size in sizes.items()},
        "tokens_per_s": {side: tokens_per_step / sample(values).median for side, values in warm.items()},
        "tokens_per_s_over_dense": speed.median,
        "spread": speed.spread,
        "quotable": speed.quotable,
        "loss": {key: losses_at_equal(points["moe"], points["dense"], key) for key in ("tokens", "flops", "seconds")},
        "curves": {side: [dataclasses.asdict(point) for point in values] for side, values in points.items()},
    }


def losses_at_equal(moe: Sequence[Point], dense: Sequence[Point], what: str) -> dict[str, float]:
    """Both losses where both have had as much of something as the one that has had less, on straight lines between
    evaluations.

    >>> moe = [Point(1, 10, 10, 4.0, 3.0), Point(2, 20, 20, 8.0, 2.0)]
    >>> dense = [Point(1, 10, 10, 2.0, 3.0), Point(2, 20, 20, 6.0, 2.5)]
    >>> losses_at_equal(moe, dense, "seconds")
    {'at': 6.0, 'moe': 2.5, 'dense': 2.5}
    """
    at = min(getattr(moe[-1], what), getattr(dense[-1], what))
    return {"at": at, "moe": loss_at(moe, what, at), "dense": loss_at(dense, what, at)}


def loss_at(points: Sequence[Point], what: str, at: float) -> float:
    """The loss at a place between the first point and the last; the nearest one's outside."""
    for before, after in zip(points, points[1:], strict=False):
        first, last = getattr(before, what), getattr(after, what)
        if first <= at <= last:
            return before.loss + (after.loss - before.loss) * (at - first) / (last - first)
    return points[0].loss if at < getattr(points[0], what) else points[-1].loss
