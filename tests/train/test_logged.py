"""What a record says is what the step trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moedist.mesh import Mesh
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoE
from moedist.moe.router.contract import Routing
from tests.rows import flat
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed, make_trainer


class Written:
    """Stands for the run's log."""

    def write(self, record: dict[str, Any]) -> None:
        self.record = record


def by_hand(heard: list[tuple[Routing, TokenContext]]) -> dict[str, Any]:
    """A layer's Switch loss of each row and z-loss, averaged over all rows of the step, and its loads."""
    switch, z_loss, load_E = [], [], torch.zeros(8, dtype=torch.int64)
    for routing, _ in heard:
        asked_T = torch.nn.functional.one_hot(routing.expert_N.view(-1, 2), 8).sum(1)
        for asked_SE, probs_SE in zip(asked_T.split(LENGTH), routing.probs_TE.split(LENGTH), strict=True):
            switch.append(8 * (asked_SE.sum(0) / (2 * LENGTH) * probs_SE.mean(0)).sum().item())
        z_loss += routing.logits_TE.logsumexp(1).square().tolist()
        load_E += asked_T.sum(0)
    return {
        "balance_loss": sum(switch) / len(switch),
        "z_loss": sum(z_loss) / len(z_loss),
        "load": load_E.tolist(),
    }


@pytest.mark.pitfall("12")
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_logged_values_are_those_of_the_whole_step(accumulation: int, recompute: bool):
    """Recomputation counts nothing again, every micro-batch counts, and coefficients are left out."""
    config = changed(
        CONFIG,
        moe={"balance": {"switch": SwitchConfig(0.3, "sequence"), "z_loss": ZLossConfig(0.1)}},
        train={
            "global_batch_tokens": accumulation * ROWS * LENGTH,
            "activation_checkpointing": "full" if recompute else "none",
        },
    )
    trainer, log = make_trainer(config, config.data.open(), Mesh.alone()), Written()
    layers = [module for module in trainer.model.modules() if isinstance(module, MoE)]
    heard: dict[int, list[tuple[Routing, TokenContext]]] = {layer.layer: [] for layer in layers}
    for layer in layers:
        layer.router.register_forward_hook(
            lambda _, args, routing, block=layer.layer: heard[block].append((routing, args[1]))
        )
    assert trainer.step(trainer.loader())
    trainer.record(log, evaluated=False)  # type: ignore[arg-type]
    means: dict[str, list[float]] = {"balance_loss": [], "z_loss": []}
    for block, routings in heard.items():
        assert len(routings) == accumulation
        for name, value in by_hand(routings).items():
            assert flat(log.record)[f"moe/layer_{block:02d}/{name}"] == pytest.approx(value, abs=1e-12), name
            means.get(name, []).append(value)
    for name, values in means.items():
        assert flat(log.record)[f"moe/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-12)
