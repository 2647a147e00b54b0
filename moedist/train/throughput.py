"""What the machine can do and what it holds, measured where the run runs."""

from __future__ import annotations

import resource
import sys
import time

import torch

from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum

MEASURE_S = 0.2


def measured_peak_flops(mesh: Mesh, dtype: torch.dtype) -> float:
    """FLOP/s that all ranks together reach on a large matrix product in ``dtype``, all at the same time; the
    denominator of MFU, because a datasheet's figure is no machine's."""
    size = 4096 if mesh.device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=mesh.device).to(dtype) for _ in range(2))
    best, end = 0.0, None
    while end is None or time.perf_counter() < end:
        _synchronize(mesh)
        start = time.perf_counter()
        a @ b
        _synchronize(mesh)
        if end is None:  # the first one warms up
            end = time.perf_counter() + MEASURE_S
            continue
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return float(all_sum(torch.tensor(best, dtype=torch.float64, device=mesh.device), mesh.dp))


def peak_memory(device: torch.device) -> int:
    """Bytes of this rank's peak: allocated device memory on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
