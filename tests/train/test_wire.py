"""Steps whose rows travel in fewer bits: the same at every layout, computed again or not, under a budget or not."""

from __future__ import annotations

import pytest

from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.budget import BudgetConfig
from tests.ranks import Here
from tests.train.test_spill import BASE, STEPS, Run, differs, train
from tests.train.tiny import changed


def losses_of(run: Run) -> list[float]:
    return [*(record["train/loss"] for record in run.records), run.eval_loss]


def trained(here: Here, wire: str) -> tuple[float, float, float]:
    """The worst difference between layouts (in loss), from other recomputation (in all), and from the exact run."""
    config = changed(BASE, moe={"dispatch": AllToAllConfig(exchange_dtype=wire)})
    exact = train(here, BASE, 1, None)
    first, between, again = train(here, config, 1, None), 0.0, 0.0
    for ep in (1, 2, 4):
        run = train(here, config, ep, None)
        between = max(between, *(abs(one - other) for one, other in zip(losses_of(run), losses_of(first), strict=True)))
        for recompute in ("full", "selective"):
            other = changed(config, train={"activation_checkpointing": recompute})
            again = max(again, differs(train(here, other, ep, None), run))
        for factor in (1.0, float(ep)):
            blocks = BudgetConfig(factor, exchange_dtype=wire)
            other = train(here, changed(config, moe={"dispatch": blocks}), ep, None)
            assert (other.attempts > STEPS) == (factor < ep), "too small a budget must be run again"
            again = max(again, differs(other, run))
    return between, again, abs(first.eval_loss - exact.eval_loss)


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_rounding_depends_on_no_layout(ranks, wire: str):
    for between, again, off in ranks(4).run(trained, wire, limit_s=300):
        assert between <= 1e-12 and again <= 1e-12
        assert 1e-9 < off < 1e-2, "the rounding must be there, and small"
