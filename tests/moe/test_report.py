"""Reports as two tensors."""

from __future__ import annotations

import pytest
import torch

from moedist.moe.report import MoEReport, pack_reports


def report(losses, coefficients, counts):
    return MoEReport(
        layer=0,
        losses={name: torch.tensor(value, requires_grad=True) for name, value in losses.items()},
        coefficients={name: torch.tensor(value) for name, value in coefficients.items()},
        counts={},
        observed={},
        router_entropy=torch.tensor(0.5),
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
    assert packed.entropy_L.tolist() == [0.5, 0.5]
    packed.objective().backward()
    assert packed.objective().item() == pytest.approx(0.2 + 0.03 + 1.4 + 5)
    # Pitfall 10: each coefficient acts once.
    assert first.losses["z"].grad.item() == pytest.approx(0.01)
    assert second.losses["switch"].grad.item() == pytest.approx(0.2)


def test_no_losses_in_evaluation():
    packed = pack_reports([report({}, {}, [1, 1])])
    assert packed.names == () and packed.objective().item() == 0
