"""What a rank reaches at best while all ranks do the same, in a large matrix product and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moedist.bench.floor import Ceilings
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum, barrier

WIDTH = {"cpu": 1024, "cuda": 8192}
"""Of the matrices."""
COPIED = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of the copied tensor, above what caches hold."""
MEASURE_S = 0.5


def measure_ceilings(mesh: Mesh, dtype: torch.dtype) -> Ceilings:
    """The mean over ranks of each one's best try; called by all."""
    width, device = WIDTH[mesh.device.type], mesh.device
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    flops = 2 * width**3 / best_of(lambda: torch.mm(a, b, out=product), mesh)
    copied = 2 * source.numel() * 4 / best_of(lambda: target.copy_(source), mesh)
    total = all_sum(torch.tensor([flops, copied], dtype=torch.float64, device=device), mesh.dp)
    flops, copied = (total / mesh.dp.size).tolist()
    return Ceilings(flops, copied)


def best_of(work: Callable[[], object], mesh: Mesh) -> float:
    """Least seconds of as many tries as fit into `MEASURE_S`, after one that warms up."""
    work()
    barrier(mesh.dp, mesh.device)
    best, end = float("inf"), time.perf_counter() + MEASURE_S
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        best = min(best, time.perf_counter() - begin)
    return best
