"""What more experts cost at the same work per token: a layer with 8, 16, ... experts, against its floor."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moedist.bench.ceilings import measure_ceilings
from moedist.bench.floor import fused_kernels, least_seconds
from moedist.bench.layer import step_of
from moedist.bench.ours import ours
from moedist.bench.rounds import Sample, sample, take_turns
from moedist.bench.shapes import LayerShape
from moedist.bench.trial import make_trial
from moedist.mesh import Mesh

EXPERTS = (8, 16, 32, 64, 128, 256)


def measure_scaling(shapes: list[LayerShape], factor: float | None, rounds: int, mesh: Mesh) -> list[dict[str, Any]]:
    """Balanced routing, every number of experts in every round; called on all ranks. A case per shape."""
    return [measure_growth(shape, factor, rounds, mesh) for shape in shapes]


def measure_growth(shape: LayerShape, factor: float | None, rounds: int, mesh: Mesh) -> dict[str, Any]:
    """One shape; the optimizer's step, which grows with the parameters whatever a layer does, is timed apart."""
    ceilings = measure_ceilings(mesh, shape.dtype)
    sizes = [num for num in EXPERTS if num >= shape.top_k and num % mesh.ep.size == 0]
    shapes = {num: dataclasses.replace(shape, num_experts=num) for num in sizes}
    work, optimizers, routing = {}, {}, ""
    for num, sized in shapes.items():
        trial = make_trial(sized, "balanced", factor, mesh)
        layer, routing = ours().build(trial), trial.routing
        work[f"{num}"] = step_of(layer, trial)
        work[f"{num}"]()
        optimizers[f"{num}, optimizer"] = torch.optim.AdamW(list(layer.parameters()), lr=1e-4, fused=True).step
    seconds = take_turns({**work, **optimizers}, rounds, mesh)
    floors = {num: least_seconds(fused_kernels(sized, mesh.ep.size), ceilings) for num, sized in shapes.items()}
    over_floor = {num: [each / floors[num] for each in seconds[f"{num}"]] for num in sizes}
    growth = sample([last / first for first, last in zip(over_floor[sizes[0]], over_floor[sizes[-1]], strict=True)])
    rows: list[dict[str, Any]] = []
    for num in sizes:
        took: Sample = sample(seconds[f"{num}"])
        rows.append(
            {
                "num_experts": num,
                "ms": 1e3 * took.median,
                "spread": took.spread,
                "f2_ms": 1e3 * floors[num],
                "over_f2": took.median / floors[num],
                "optimizer_ms": 1e3 * sample(seconds[f"{num}, optimizer"]).median,
            }
        )
    return {
        "config": shape.name,
        "routing": routing,
        "capacity_factor": factor,
        "rounds": rounds,
        "ceilings": {"matmul_tflops": ceilings.flops / 1e12, "copy_gb_per_s": ceilings.bytes / 1e9},
        "sizes": rows,
        "growth": growth.median,
        "growth_spread": growth.spread,
        "quotable": growth.quotable,
    }
