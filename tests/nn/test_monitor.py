"""The monitor: averages, sums over ranks, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moedist.nn import ExpertSpecializationMonitor, MoELayer
from tests.ranks import Here

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "routing.json").read_text())["G13_monitor"]


@pytest.mark.requirement("G13")
def test_R2_51_averages():
    monitor = ExpertSpecializationMonitor(4)
    for gates in GOLDEN["gates"]:
        monitor.update(torch.tensor(gates))
    stats = monitor.get_statistics()
    assert monitor.num_steps == GOLDEN["steps"] and monitor.usage_E.tolist() == GOLDEN["usage_counts"]
    assert stats.avg_usage.tolist() == pytest.approx(GOLDEN["avg_usage"])
    assert stats.avg_gates.tolist() == pytest.approx(GOLDEN["avg_gates"])
    assert stats.avg_gates.sum().item() == pytest.approx(GOLDEN["sum_avg_gates"])


def test_R2_52_zero_steps():
    stats = ExpertSpecializationMonitor(3).get_statistics()
    assert stats.avg_usage.tolist() == stats.avg_gates.tolist() == [0.0] * 3
    monitor = ExpertSpecializationMonitor(3)
    monitor.update(torch.ones(2, 3))
    monitor.reset()
    assert monitor.get_statistics().avg_usage.tolist() == [0.0] * 3 and monitor.num_steps == 0


def test_of_a_layer():
    layer = MoELayer([nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 3), 4, top_k=2)
    monitor, x = ExpertSpecializationMonitor(3), torch.randn(9, 4)
    with pytest.raises(ValueError, match="has no forward pass"):
        monitor.update(layer)
    layer(x)
    monitor.update(layer)
    probs, chosen = layer.moe.router.scorer(x).softmax(1).topk(2)
    gates = torch.zeros(9, 3).scatter(1, chosen, probs / probs.sum(1, keepdim=True))
    other = ExpertSpecializationMonitor(3)
    other.update(gates.view(3, 3, 3))
    for name in ("avg_usage", "avg_gates"):
        torch.testing.assert_close(getattr(monitor.get_statistics(), name), getattr(other.get_statistics(), name))
    with pytest.raises(ValueError, match="gates of 3 experts, and the monitor is for 4"):
        ExpertSpecializationMonitor(4).update(gates)


def on_ranks(here: Here) -> tuple[list[float], list[float], list[str]]:
    """Unlike numbers of tokens, one rank with none."""
    monitor = ExpertSpecializationMonitor(2, here.mesh_of(2).dp)
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    monitor.update(gates[:0] if here.rank == 0 else gates)
    monitor.update(gates[: 1 + here.rank])
    stats = monitor.get_statistics()
    return stats.avg_usage.tolist(), stats.avg_gates.tolist(), monitor.warnings()


@pytest.mark.requirement("R2-51")
def test_R2_51_sums_over_ranks(ranks):
    """Every rank sees the whole batch: 3 tokens, then 1 and 2 of them."""
    for usage, gates, warnings in ranks(2).run(on_ranks):
        assert usage == [2.5, 1.5] and warnings == []
        assert gates == pytest.approx([(1.5 / 3 + 2.5 / 3) / 2, (1.5 / 3 + 0.5 / 3) / 2])


@pytest.mark.requirement("R2-60")
def test_R2_60_warnings():
    def warnings_of(gates: list[list[float]]) -> list[str]:
        monitor = ExpertSpecializationMonitor(len(gates[0]))
        monitor.update(torch.tensor(gates))
        return [warning.split(":")[0] for warning in monitor.warnings()]

    assert ExpertSpecializationMonitor(4).warnings() == []
    assert warnings_of([[0.9, 0.1], [0.1, 0.9]]) == []
    assert warnings_of([[0.9, 0.1, 0, 0]] * 5) == ["collapse"]
    assert warnings_of([[0.5, 0.5, 0, 0], [0, 0, 0.51, 0.49]]) == ["too uniform"]
    assert warnings_of([[1.0, 0], [0, 1.0]]) == []
    monitor = ExpertSpecializationMonitor(3)
    monitor.update(torch.tensor([[1.0, 0, 0]] * 4))
    (warning,) = monitor.warnings()
    assert warning.startswith("collapse: experts 1, 2 of 3 get less than 10% of an even share; raise aux_loss_weight")
