"""The task loss."""

from __future__ import annotations

import pytest
import torch

from moedist.model import loss
from moedist.model.batch import IGNORE
from moedist.model.contract import ModelOutput
from moedist.model.loss import token_loss

TARGET_BS = torch.tensor([[3, IGNORE, 0, 6], [IGNORE, 2, 2, IGNORE]])


@pytest.mark.parametrize("chunk_size", [1, 14, 21, 10_000])
def test_is_the_sum_over_targets_however_it_is_cut(monkeypatch, chunk_size):
    monkeypatch.setattr(loss, "CHUNK_SIZE", chunk_size)
    logits_BSV = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    value = token_loss(ModelOutput(logits_BSV, ()), TARGET_BS)
    probs_BSV = logits_BSV.softmax(-1)
    want = -sum(probs_BSV[b, s, TARGET_BS[b, s]].log() for b, s in [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2)])
    torch.testing.assert_close(value, want, rtol=1e-13, atol=1e-13)
    (got_gradient,) = torch.autograd.grad(value, logits_BSV)
    (want_gradient,) = torch.autograd.grad(want, logits_BSV)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-12, atol=1e-13)


def test_narrow_logits_are_widened_before_the_softmax():
    logits_BSV = (torch.randn(2, 4, 7) * 4).bfloat16()
    value = token_loss(ModelOutput(logits_BSV, ()), TARGET_BS)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, token_loss(ModelOutput(logits_BSV.float(), ()), TARGET_BS))


def test_without_targets_it_is_zero():
    logits_BSV = torch.randn(1, 3, 7, requires_grad=True)
    value = token_loss(ModelOutput(logits_BSV, ()), torch.full((1, 3), IGNORE))
    value.backward()
    assert value.item() == 0 and logits_BSV.grad.eq(0).all()


def test_log_probabilities_are_kept_for_one_chunk_only(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_SIZE", 1600)
    sizes: list[int] = []
    softmax = torch.nn.functional.cross_entropy

    def measured(logits_RV: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        sizes.append(logits_RV.numel())
        return softmax(logits_RV, *args, **options)

    monkeypatch.setattr(loss, "cross_entropy", measured)
    logits_BSV, target_BS = torch.randn(4, 64, 100, requires_grad=True), torch.randint(100, (4, 64))
    value = token_loss(ModelOutput(logits_BSV, ()), target_BS)
    assert sizes == [1600] * 16
    value.backward()
    assert sizes == [1600] * 32  # made again in backward, not kept
