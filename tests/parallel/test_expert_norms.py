from __future__ import annotations

import dataclasses

import torch

from moedist.mesh import MeshConfig
from moedist.mesh.collectives import all_sum
from moedist.moe.layer import MoE
from moedist.parallel.expert_norms import ExpertNorms
from moedist.train.build import build_model
from tests.ranks import Here
from tests.train.tiny import CONFIG

LAYOUTS = ((1, None), (2, None), (4, None), (1, 4), (2, 4), (2, 2), (4, 4))


def apart(here: Here) -> list[float]:
    """Of every layout the largest difference between the squares summed over ranks and those of the whole weights."""
    found = []
    for ep, fsdp in LAYOUTS:
        mesh = here.mesh_of(ep, fsdp)
        config = dataclasses.replace(CONFIG, mesh=MeshConfig(ep=ep, fsdp=fsdp))
        spread = build_model(config, 37, mesh)
        layers = [module for module in spread.model.modules() if isinstance(module, MoE)]
        square_LE = ExpertNorms(layers, spread.model, spread.gradients).squares(lambda parameter: parameter)
        assert square_LE is not None
        whole = [
            sum(p.full_tensor().double().flatten(1).square().sum(1) for p in layer.bank.experts.parameters())
            for layer in layers
        ]
        found.append((all_sum(square_LE, mesh.dp) / torch.stack(whole) - 1).abs().max().item())
    return found


def test_squares_add_up_over_ranks_however_weights_are_cut(ranks):
    for differences in ranks(4).run(apart):
        assert max(differences) < 1e-12, dict(zip(LAYOUTS, differences, strict=True))
