"""n ranks equal one device: the gradients of one optimizer step, through the trainer's and the engine's own path."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moedist.config import require
from moedist.data.check import open_data
from moedist.data.contract import Source
from moedist.doctor.one_device import on_one_device, run_in_blocks
from moedist.log.metrics import ASKED, KEPT
from moedist.mesh import Axis, Mesh
from moedist.parallel import GradientTable
from moedist.train.build import build_model
from moedist.train.checkpoint import CheckpointStore
from moedist.train.config import RunConfig
from moedist.train.ending import Ending
from moedist.train.optimizer.contract import OptimizerConfig
from moedist.train.run import make_watchdog
from moedist.train.signals import StopRequest
from moedist.train.trainer import WATCHDOG_MARGIN_S, Progress, Trainer
from moedist.train.watchdog import Watchdog

RESULT = "parity.json"
"""Where rank 0 leaves the comparison, in the run folder."""
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
"""Largest difference of a parameter's gradient, as a multiple of its largest entry."""
FLOOR = {"fp64": 1e-14, "fp32": 1e-9}
"""Differences that are rounding, however small a gradient is."""


class ShownGradients(torch.optim.Optimizer):
    """Its step puts every parameter's gradient in the parameter's place.

    So whatever an engine does with gradients (sums, cuts into pieces, keeps in flat buffers), its own way of handing
    out updated weights hands out the gradients that it would have updated them with.
    """

    def __init__(self, parameters: list[dict[str, Any]]):
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Shows; at rate zero it moves nothing, as other optimizers, which engines use to make their state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["step"] = torch.ones(())
                if parameter.grad is not None and group["lr"] != 0:
                    parameter.copy_(parameter.grad)


@dataclasses.dataclass(frozen=True)
class ShownGradientsConfig(OptimizerConfig):
    """In place of the run's optimizer."""

    def build(self, model: nn.Module, gradients: GradientTable) -> ShownGradients:
        """One group per role."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(gradients.spread_of[name].role, []).append(parameter)
        return ShownGradients([{"name": role, "params": parameters} for role, parameters in groups.items()])


@dataclasses.dataclass(frozen=True)
class Step:
    """What one optimizer step came to.

    Attributes:
        loss: task loss.
        balance: unscaled balance losses by name, summed over layers.
        norm: of the whole gradient.
        count_LME: pairs of each layer's experts (`PackedReports.count_LME`); None without MoE layers.
        gradients: whole, by parameter.
        layouts: how each parameter lies, in words.
    """

    loss: float
    balance: dict[str, float]
    norm: float
    count_LME: Tensor | None
    gradients: dict[str, Tensor]
    layouts: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one parameter.

    Attributes:
        name, layout: which, and how it lies on the ranks.
        largest: max|g| on one device.
        difference: max|g - g'|.
        limit: that it must not exceed.
    """

    name: str
    layout: str
    largest: float
    difference: float
    limit: float

    @property
    def good(self) -> bool:
        """Whether ranks equal one device here; a difference that is no number does not."""
        return self.difference <= self.limit


def check_rank(config: RunConfig, run_dir: Path, mesh: Mesh) -> int:
    """Called on every rank of the shrunk run; rank 0 then is the one device too, and writes `RESULT`. Returns the exit
    code."""
    slow_s = config.mesh.save_timeout_s + WATCHDOG_MARGIN_S
    with make_watchdog(config, run_dir, mesh) as watchdog, Ending(run_dir, mesh) as end:
        begin = time.perf_counter()
        watchdog.enter("data", 0, slow_s)
        source = open_data(config.data)
        ours = take_step(config, source, mesh, watchdog, run_dir)
        if mesh.dp.rank == 0:
            watchdog.enter("one device", 0, slow_s)
            theirs = take_step(
                on_one_device(config, mesh.dp.size), source, Mesh.alone(mesh.device), watchdog, run_dir, mesh.dp.size
            )
            result = compare(ours, theirs, config.train.precision)
            result |= {"data": source.describe(), "seconds": time.perf_counter() - begin}
            (run_dir / RESULT).write_text(json.dumps(result), encoding="utf-8")
        end.at("done", "Compared.")
    return end.exit_code


def take_step(
    config: RunConfig, source: Source, mesh: Mesh, watchdog: Watchdog, run_dir: Path, num_blocks: int = 1
) -> Step:
    """The first step of a run, its optimizer replaced; ``num_blocks`` ranks' micro-batches in each of its own."""
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, optimizer=ShownGradientsConfig(), clip_norm=None)
    )
    spread = build_model(config, source.vocab_size, mesh)
    if num_blocks > 1:
        run_in_blocks(spread.model, num_blocks)
    store = CheckpointStore(run_dir / "checkpoints", Axis("slow"))
    trainer = Trainer(config, mesh, source, spread, store, StopRequest(), watchdog, Progress("parity"), {})
    trainer.model.train()
    try:
        require(
            "optimizer" not in (trainer.engine.settings() or {}),
            "engine.config",
            config.engine.kind,
            "brings an optimizer of its own, which shows no gradients",
            "Check it without: gradients do not depend on the optimizer.",
        )
        assert trainer.step(trainer.loader())
        total = trainer.tally.reduce(mesh.dp)
        state = trainer.engine.state()["model"]
        table = spread.gradients.spread_of
        layouts = {
            name: f"{1 if lies.pieces is None else lies.pieces.size} pieces x {lies.copies.size} copies"
            for name, lies in table.items()
        }
        moe = total.moe
        return Step(
            loss=total.loss,
            balance={} if moe is None else dict(zip(moe.loss_names, moe.loss_LJ.sum(0).tolist(), strict=True)),
            norm=trainer.grad_norm,
            count_LME=None if moe is None else moe.count_LME,
            gradients={name: whole(state[name]).detach().cpu().clone() for name in table},
            layouts=layouts,
        )
    finally:
        trainer.engine.close()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; called by all ranks that hold a piece."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(ours: Step, theirs: Step, precision: str) -> dict[str, Any]:
    """The comparison as JSON: ``good``, the differences of the numbers, and every parameter's, the worst first.

    ``last_wrong`` is the wrong gradient nearest to the loss: backward comes by it first, and those of earlier layers
    inherit its fault.
    """
    tolerance, floor = TOLERANCE[precision], FLOOR[precision]
    assert ours.gradients.keys() == theirs.gradients.keys(), "ranks and one device have unlike parameters"
    found = []
    for name, grad in theirs.gradients.items():
        largest = grad.abs().max().item() if grad.numel() else 0.0
        difference = (ours.gradients[name] - grad).abs().max().item() if grad.numel() else 0.0
        found.append(Difference(name, ours.layouts[name], largest, difference, max(tolerance * largest, floor)))
    wrong = [one.name for one in found if not one.good]
    found.sort(key=lambda one: one.difference / one.limit if math.isfinite(one.difference) else math.inf, reverse=True)
    numbers = {"loss": (ours.loss, theirs.loss), "norm": (ours.norm, theirs.norm)}
    numbers |= {name: (value, theirs.balance[name]) for name, value in ours.balance.items()}
    close = {name: abs(a - b) <= tolerance * max(1.0, abs(b)) for name, (a, b) in numbers.items()}
    pairs = compare_pairs(ours.count_LME, theirs.count_LME)
    return {
        "good": not wrong and all(close.values()) and pairs["good"],
        "precision": precision,
        "tolerance": tolerance,
        "numbers": {name: {"ranks": a, "one_device": b, "good": close[name]} for name, (a, b) in numbers.items()},
        "pairs": pairs,
        "last_wrong": wrong[-1] if wrong else None,
        "parameters": [{**dataclasses.asdict(one), "good": one.good} for one in found],
    }


def compare_pairs(ours_LME: Tensor | None, theirs_LME: Tensor | None) -> dict[str, Any]:
    """Whether each expert was asked for, has computed and has lost as many pairs; and how many there are."""
    if ours_LME is None or theirs_LME is None:
        return {"asked": 0, "kept": 0, "good": ours_LME is theirs_LME}
    asked, kept = (int(ours_LME[:, place].sum()) for place in (ASKED, KEPT))
    return {"asked": asked, "kept": kept, "good": torch.equal(ours_LME, theirs_LME)}
