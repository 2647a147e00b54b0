"""The losses of a layer's last forward pass: when there are any, their values, and how long their graph lives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from tests.nn.made import given_routing, layer_of, modules_of, vectors


def test_R1_13_weight_changes_at_run_time():
    layer = layer_of(use_aux_loss=True)
    layer(vectors(4))
    unscaled = layer.aux_loss
    layer.aux_loss_weight = 0.05
    assert layer.aux_loss_weight == 0.05 and layer.aux_loss is unscaled
    with pytest.raises(ValueError, match="aux_loss_weight = -0.1"):
        layer.aux_loss_weight = -0.1


@pytest.mark.requirement("R1-19", "R1-32", "C9", "R1-48")
def test_R1_19_aux_loss_switch():
    """Off: nothing is computed, the trainer's view is 0 without a graph, an explicit call says why."""
    layer, x = layer_of(), vectors(4)
    with pytest.raises(RuntimeError, match="the auxiliary loss is off: set use_aux_loss"):
        layer.compute_auxiliary_loss()
    layer(x)
    assert layer.aux_loss == 0 and not layer.aux_loss.requires_grad and layer.z_loss == 0
    layer.use_aux_loss = True
    with pytest.raises(RuntimeError, match="run a forward pass first"):
        layer_of(use_aux_loss=True).compute_auxiliary_loss()
    out = layer(x)
    assert layer.compute_auxiliary_loss().requires_grad and layer.aux_loss > 0 and layer.z_loss > 0
    layer.eval()
    layer(x)
    assert layer.aux_loss == 0
    with pytest.raises(RuntimeError, match="off in evaluation"):
        layer.compute_auxiliary_loss()
    del out


def test_R1_28_auxiliary_loss():
    """tokens [3, 2, 2, 1] / 8 and mass [0.4, 0.3, 0.2, 0.1]: 1.15."""
    mass = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    probs_TE = torch.full((8, 4), 0.0, dtype=torch.float64)
    for token, expert in enumerate([0, 0, 0, 1, 1, 2, 2, 3]):
        probs_TE[token, expert] = 1.0
    # Rows that choose as wanted and whose mean is the mass: mix one-hot rows with what is left of the mass.
    share = torch.tensor([3, 2, 2, 1], dtype=torch.float64) / 8
    keep = 0.5
    probs_TE = keep * probs_TE + (mass - keep * share)
    layer = given_routing(probs_TE, 1)
    layer(torch.eye(8, dtype=torch.float64))
    assert layer.compute_auxiliary_loss().item() == pytest.approx(1.15, abs=1e-12)


@pytest.mark.requirement("R1-29", "C10", "D9")
def test_R1_29_dense_counts_what_is_used():
    """A fixed threshold of 0.01 would count nothing of 128 even experts; 1 / (2 E) counts all."""
    layer = given_routing(torch.full((2, 128), 1 / 128, dtype=torch.float64), None)
    layer(torch.eye(2, dtype=torch.float64))
    assert layer.usage.tokens_E.tolist() == [2.0] * 128
    assert layer.aux_loss.item() == pytest.approx(1)
    probs_TE = torch.tensor([[0.88, 0.04, 0.04, 0.04], [0.48, 0.48, 0.02, 0.02]], dtype=torch.float64)
    layer = given_routing(probs_TE, None)
    out = layer(torch.eye(2, dtype=torch.float64))
    assert layer.usage.tokens_E.tolist() == [2, 1, 0, 0]
    expected = 4 * (2 / 3 * 0.68 + 1 / 3 * 0.26)
    assert layer.aux_loss.item() == pytest.approx(expected)
    (0 * out.sum() + layer.aux_loss).backward()
    assert layer.moe.router.scorer.weight.grad.abs().max() > 0


@pytest.mark.requirement("R1-30", "R1-31", "C5", "C7")
def test_R1_31_uniform_is_one():
    layer = given_routing(torch.full((4, 4), 0.25, dtype=torch.float64), None)
    layer(torch.eye(4, dtype=torch.float64))
    assert layer.aux_loss.item() == pytest.approx(1) == layer.usage.balance_loss().item()


def test_R1_43_nothing_leaks():
    """Over accumulated micro-batches no graph outlives its loss, though the numbers stay."""
    layer = layer_of(use_aux_loss=True)
    graphs = []
    for step in range(3):
        x = vectors(4, seed=step)
        out = layer(x)
        loss = out.square().sum() + layer.aux_loss_weight * layer.aux_loss
        graphs.append((weakref.ref(out), weakref.ref(layer.aux_loss), weakref.ref(x)))
        loss.backward()
        del x, out, loss
        gc.collect()
        assert all(reference() is None for graph in graphs for reference in graph)
        assert layer.aux_loss > 0 and not layer.aux_loss.requires_grad and layer.z_loss > 0
    out = layer(vectors(4))
    del out  # a forward pass that nobody goes on with
    assert not layer.aux_loss.requires_grad
    with torch.no_grad():
        layer(vectors(4))
    assert layer.aux_loss > 0


def test_losses_live_as_long_as_the_output_s_graph():
    """Also where the output itself is gone: a residual keeps its graph alone."""
    layer = layer_of(use_aux_loss=True)
    x = vectors(4)
    total = (F.pad(layer(x), (0, 1)) + x).sum()
    assert layer.aux_loss.requires_grad
    (total + layer.aux_loss).backward()
    router = modules_of(layer)[0]
    assert router.weight.grad.abs().max() > 0
