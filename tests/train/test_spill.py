"""Steps under a budget equal steps without: thrown away where rows were left behind, run again, counted once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moedist.log.config import TraceConfig
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.dispatch.budget import BudgetConfig
from moedist.train.config import RunConfig
from moedist.train.evaluate import evaluate
from tests.ranks import Here
from tests.rows import flat
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, leaves, make_trainer, no_measuring

STEPS = 3
BASE = changed(
    CONFIG,
    train={"steps": STEPS},
    capacity={"factor": None},
    moe={"balance": {"switch": SwitchConfig(0.3, accumulation="two_pass"), "bias": BiasConfig(0.01)}},
    log={"trace": TraceConfig(every=1)},
)


@dataclasses.dataclass
class Run:
    """All that a run makes and keeps, on one rank.

    Attributes:
        records: of every step.
        gradients: of every step, summed and not clipped, by name.
        state: at the end: parameters, biases, moments, counters.
        progress: tokens, samples, steps.
        eval_loss: at the end.
        random: the next number that anybody draws from the process.
        attempts: at a step, all together.
        recorded: experts that every token chose, as the trace of each step has them.
    """

    records: list[dict[str, Any]]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]
    progress: dict[str, Any]
    eval_loss: float
    random: float
    attempts: int
    recorded: list[Tensor]


def train(here: Here, config: RunConfig, ep: int, fsdp: int | None) -> Run:
    mesh = here.mesh_of(ep, fsdp)
    trainer = make_trainer(config, source := config.data.open(), mesh)
    torch.manual_seed(here.rank)
    gradients: list[dict[str, Tensor]] = []
    attempts, step = [0], trainer.engine.step

    def noting(summed: Any) -> float:
        named: dict[str, Tensor] = {}

        def note(gradient_of: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                named[name] = local(gradient_of(parameter)).clone()
            summed(gradient_of)

        attempts[0] += 1
        norm = step(note)
        if math.isfinite(norm):
            gradients.append(named)
        return norm

    def draw(*_: Any) -> None:
        torch.rand(1)  # as somebody's own module may, in training

    trainer.engine.step = noting
    trainer.model.register_forward_pre_hook(draw)
    loader, records, recorded = trainer.loader(), [], []
    with no_measuring():
        for _ in range(STEPS):
            trainer.step(loader)
            progress = trainer.progress
            trace = trainer.recorder.take(progress.step)
            recorded.append(torch.stack([layer.expert_TK for layer in trace.layers.values()]))
            records.append(flat(trainer.measures.record(progress.step, progress.tokens, {}, trainer.grad_norm)))
        loss = evaluate(trainer.model, source, config, mesh, STEPS)
    state = {name: local(value).clone() for name, value in leaves(trainer.state())}
    progress = dataclasses.asdict(trainer.progress)
    return Run(records, gradients, state, progress, loss, torch.rand(1).item(), attempts[0], recorded)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


OF_NO_STEP = ("time/", "train/tokens_per_s", "train/tflops", "train/mfu", "train/memory", "train/data", "moe/exchange")


def differs(got: Run, expected: Run) -> float:
    """The worst difference; all that is no measure of time, memory or bytes must agree."""
    worst = abs(got.eval_loss - expected.eval_loss)
    assert got.progress == expected.progress and got.random == expected.random
    assert all(torch.equal(one, other) for one, other in zip(got.recorded, expected.recorded, strict=True))
    assert len(got.gradients) == len(expected.gradients) == STEPS
    for mine, other in zip([got.state, *got.gradients], [expected.state, *expected.gradients], strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if value.numel():
                worst = max(worst, (value.double() - other[name].double()).abs().max().item())
    for mine, other in zip(got.records, expected.records, strict=True):
        assert mine.keys() - {"train/spilled_steps"} == other.keys()
        for key, value in other.items():
            if not key.startswith(OF_NO_STEP):
                worst = max(worst, (torch.tensor(mine[key]) - torch.tensor(value)).abs().max().item())
    return worst


def budgeted(here: Here, ep: int, fsdp: int | None, recompute: str, factors: tuple[float, ...]) -> list[list[int]]:
    """Of each budget, how many attempts each step took beyond the first; its run is held against all_to_all's."""
    batch = 2 * here.world * ROWS * LENGTH  # in two micro-steps
    config = changed(BASE, train={"activation_checkpointing": recompute, "global_batch_tokens": batch})
    expected, found = train(here, config, ep, fsdp), []
    for factor in factors:
        run = train(here, changed(config, moe={"dispatch": BudgetConfig(factor)}), ep, fsdp)
        again = [record["train/spilled_steps"] for record in run.records]
        assert run.attempts == STEPS + sum(again)
        assert differs(run, expected) <= 1e-12
        found.append(again)
    return found


def test_a_budget_changes_no_number(ranks):
    """A budget that holds in all steps but the first."""
    assert ranks(2).run(budgeted, 2, None, "none", (1.2,)) == [[[1, 0, 0]]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ep", "fsdp", "recompute"),
    [(1, None, "none"), (2, None, "full"), (4, None, "none"), (2, 2, "selective"), (2, 4, "full"), (4, 4, "selective")],
)
def test_a_budget_changes_no_number_anywhere(ranks, ep: int, fsdp: int | None, recompute: str):
    """A budget that never holds, one that holds in some steps, and one that always does; one rank holds all."""
    results = ranks(4).run(budgeted, ep, fsdp, recompute, (1.0, {1: 1.0, 2: 1.28, 4: 1.7}[ep], float(ep)), limit_s=300)
    never, some, always = results[0]
    assert results == [[never, some, always]] * 4
    assert always == [0] * STEPS
    if ep > 1:
        assert never == [1] * STEPS and 0 < sum(some) < STEPS
