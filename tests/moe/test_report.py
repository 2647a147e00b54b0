"""Reports as two tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moedist.moe.report import CountedMass, MoEReport, pack_reports


def report(losses, coefficients, counts):
    return MoEReport(
        layer=0,
        losses={name: torch.tensor(value, requires_grad=True) for name, value in losses.items()},
        coefficients={name: torch.tensor(value) for name, value in coefficients.items()},
        pooled={},
        counts={},
        observed={},
        router_entropy=torch.tensor(0.5),
        top_probability=torch.tensor(0.75),
        room=torch.tensor(16),
        asked_E=torch.tensor(counts),
        kept_E=torch.tensor(counts) // 2,
        dropped_ME=torch.tensor([[0, 0], counts, [0, 0]]) - torch.tensor([[0, 0], counts, [0, 0]]) // 2,
    )


@pytest.mark.pitfall("10")
def test_layers_with_unlike_losses():
    first = report({"switch": 2.0, "z": 3.0}, {"switch": 0.1, "z": 0.01}, [4, 2])
    second = report({"bias": 5.0, "switch": 7.0}, {"bias": 1.0, "switch": 0.2}, [6, 0])
    packed = pack_reports([first, second])
    assert packed.names == ("switch", "z", "bias")
    assert packed.loss_LJ.tolist() == [[2, 3, 0], [7, 0, 5]]
    assert packed.count_LME.tolist() == [
        [[4, 2], [2, 1], [0, 0], [2, 1], [0, 0]],
        [[6, 0], [3, 0], [0, 0], [3, 0], [0, 0]],
    ]
    assert packed.count_LME.dtype == torch.int64
    assert packed.router_LQ.tolist() == [[0.5, 0.75], [0.5, 0.75]]
    assert packed.room_L.tolist() == [16, 16]
    packed.objective().backward()
    assert packed.objective().item() == pytest.approx(0.2 + 0.03 + 1.4 + 5)
    # Pitfall 10: each coefficient acts once.
    assert first.losses["z"].grad.item() == pytest.approx(0.01)
    assert second.losses["switch"].grad.item() == pytest.approx(0.2)


def test_no_losses_in_evaluation():
    packed = pack_reports([report({}, {}, [1, 1])])
    assert packed.names == () and packed.objective().item() == 0


def test_pooled_losses_by_hand():
    """Two layers of collapsed experts, each on its own: each alone has a loss of 2, both together are even. The values'
    mean is the pooled loss and its coefficient acts once, while a loss of one layer stays what it is."""
    masses = [torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1.0]], requires_grad=True)]
    parts = [CountedMass(torch.tensor([[8, 0]]), masses[0]), CountedMass(torch.tensor([[0, 8]]), masses[1])]
    assert [part.loss().item() for part in parts] == [2, 2]
    layers = [
        dataclasses.replace(report({"z": 3.0}, {"z": 0.1, "switch": 0.5}, [8, 0]), pooled={"switch": part})
        for part in parts
    ]
    packed = pack_reports(layers)
    assert packed.names == ("z", "switch")
    assert packed.loss_LJ.tolist() == [[3, 1], [3, 1]]
    assert packed.objective().item() == pytest.approx(2 * 0.3 + 0.5)
    packed.objective().backward()
    # d(0.5 x 2 sum_i f_i (P_1i + P_2i) / 2) with f = (1, 1) / 2
    assert [mass.grad.tolist() for mass in masses] == [[[0.25, 0.25]]] * 2
    with_dense = pack_reports([*layers, report({"z": 3.0}, {"z": 0.1}, [4, 4])])
    assert with_dense.loss_LJ.tolist() == [[3, 1], [3, 1], [3, 0]]
