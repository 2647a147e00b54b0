"""Experts of unlike kinds, with edges, dropout and random directions, over ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.mixture import AttentionMixture, MixtureConfig
from moedist.moe.capacity import CapacityConfig
from moedist.parallel import recompute_in_backward, spread
from tests.model.attention.test_mixture import B, S, build, config_of, task_loss, tokens
from tests.ranks import Here

EDGE = 3
KINDS = (
    EdgeFeaturedConfig(edge_dim=EDGE),
    HyperbolicConfig(learnable=True, score="squared_lorentz"),
    LinearConfig(features="favor", num_features=8, redraw_every=2, chunk=3),
    EdgeFeaturedConfig(edge_dim=EDGE, mode="gated", num_kv_heads=1),
)


def run(mixture: AttentionMixture, rank: int, total: int) -> Tensor:
    """Forward and backward of one micro-batch, whose pairs have edges; returns the output."""
    x_BSD, ctx, sight = tokens(rank, num_tokens=total)
    draw = torch.Generator().manual_seed(50 + rank)
    sight = dataclasses.replace(sight, edges=torch.randn(B, S, S, EDGE, dtype=torch.float64, generator=draw))
    output = mixture(x_BSD, x_BSD, x_BSD, sight, dataclasses.replace(ctx, step=torch.tensor(5)))
    task_loss(output.out_BQD, ctx, total).backward()
    return output.out_BQD.detach()


def equal_one_device(here: Here, ep: int, config: MixtureConfig, recompute: str | None) -> float:
    """Worst difference of outputs and gradients from one process that runs all ranks' micro-batches."""
    mesh, total = here.mesh_of(ep), sum(int(tokens(rank)[1].valid_T.sum()) for rank in range(here.world))
    mixture, reference = build(config), build(dataclasses.replace(config, bank="replicated"))
    table = spread(mixture, mesh)
    if recompute is not None:
        recompute_in_backward(mixture, recompute)
    out = run(mixture, here.rank, total)
    table.sum_copies(mixture)
    expected = [run(reference, rank, total) for rank in range(here.world)]
    worst, references = (out - expected[here.rank]).abs().max().item(), dict(reference.named_parameters())
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        worst = max(worst, (parameter.grad - references[name].grad).abs().max().item())
    return worst


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("bank", ["replicated", "gathered"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_ranks_with_unlike_kinds_equal_one_device(ranks: Any, world: int, ep: int, bank: Any, recompute: str | None):
    config = config_of(experts=KINDS, bank=bank, dropout=0.3, capacity=CapacityConfig(factor=1.0), balance={})
    assert max(ranks(world).run(equal_one_device, ep, config, recompute)) <= 1e-12
