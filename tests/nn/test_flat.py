"""All parameters of a layer as one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moedist.nn import MoELayer
from tests.nn.made import layer_of, modules_of


@pytest.mark.requirement("R1-40", "R1-41")
def test_R1_41_flat_parameters():
    """Router, expert 0, expert 1, ...; back bit by bit; a wrong length changes nothing."""
    layer = layer_of(use_aux_loss=True)
    router, experts = modules_of(layer)
    by_hand = [p.detach().reshape(-1) for module in (router, *experts) for p in module.parameters()]
    flat = layer.get_flat_parameters()
    assert torch.equal(flat, torch.cat(by_hand)) and flat.numel() == layer.num_parameters()
    layer.set_flat_parameters(torch.zeros_like(flat))
    assert all(not parameter.any() for parameter in layer.parameters())
    layer.set_flat_parameters(flat)
    assert torch.equal(layer.get_flat_parameters(), flat)
    for wrong in (flat[:-1], torch.cat([flat, flat[:1]]), flat[None]):
        with pytest.raises(ValueError, match=f"expected a vector of {flat.numel()} numbers, got one of shape"):
            layer.set_flat_parameters(wrong + 1)
        assert torch.equal(layer.get_flat_parameters(), flat)
    half = layer_of(dtype=torch.bfloat16)
    assert half.get_flat_parameters().dtype == torch.bfloat16


def test_a_layer_without_parameters_has_an_empty_vector():
    layer = MoELayer([nn.Identity(), nn.Tanh()], nn.Hardtanh(), 2, top_k=1)
    assert layer.num_parameters() == 0 == layer.get_flat_parameters().numel()
    layer.set_flat_parameters(torch.zeros(0))
