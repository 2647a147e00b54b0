"""The experts' matrix products and nothing else: no router, no rows moved, no activation, no exchange."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moedist.bench.trial import Trial

PRODUCTS = "products"


def bare_products(trial: Trial) -> Callable[[], None]:
    """Multiplies, when called, what this rank's experts multiply forward and backward, one expert after the other, at
    the row counts that the trial's routing gives. All operands lie ready."""
    shape, sizes = trial.shape, trial.local_sizes
    generator = torch.Generator().manual_seed(0)

    def of(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(trial.mesh.device, shape.dtype)

    rows = [of(size, shape.dim) for size in sizes]
    hidden = [of(size, shape.hidden_dim) for size in sizes]
    ups = [[of(shape.dim, shape.hidden_dim) for _ in range(shape.num_up)] for _ in sizes]
    downs = [of(shape.hidden_dim, shape.dim) for _ in sizes]

    def multiply() -> None:
        for x, h, up, down in zip(rows, hidden, ups, downs, strict=True):
            for weight in up:
                torch.mm(x, weight)
            torch.mm(h, down)
        for x, h, up, down in zip(rows, hidden, ups, downs, strict=True):
            torch.mm(x, down.t())
            torch.mm(h.t(), x)
            for weight in up:
                torch.mm(h, weight.t())
                torch.mm(x.t(), h)

    return multiply
