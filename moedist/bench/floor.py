"""How fast one MoE layer could be, forward and backward: sums over kernels of max(FLOPs / P, bytes / B).

P and B are those of the machine (`moedist.bench.ceilings`). Two floors: `fused_kernels`, one kernel per matrix product
that gathers its rows and applies the activation itself, the denominator of every share that is printed (F2); and
`unfused_kernels`, what index_select, grouped products, silu, mul, scale and index_add can reach at best (F3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from moedist.bench.shapes import LayerShape


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine reaches on one rank while all ranks do the same.

    Attributes:
        flops: FLOP/s of a large matrix product (P).
        bytes: B/s of a large copy, read and written (B).
    """

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel at its least: every operand read once, every result written once."""

    name: str
    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Bound by whichever takes longer."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


def least_seconds(kernels: Iterable[Kernel], ceilings: Ceilings) -> float:
    """One kernel after the other.

    >>> least_seconds([Kernel("a", 4.0, 1.0), Kernel("b", 1.0, 6.0)], Ceilings(flops=2.0, bytes=2.0))
    5.0
    """
    return sum(kernel.seconds(ceilings) for kernel in kernels)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Bytes of what kernels read and write, on one rank."""

    token: float  # [T, D]
    row: float  # [N, D]
    hidden: float  # [N, F]
    up: float  # weights of one matrix per local expert
    scores: float  # [T, E] fp32, written and read


def _pieces(shape: LayerShape, ranks: int) -> _Pieces:
    size = shape.dtype.itemsize
    return _Pieces(
        token=size * shape.tokens * shape.dim,
        row=size * shape.pairs * shape.dim,
        hidden=size * shape.pairs * shape.hidden_dim,
        up=size * shape.num_experts / ranks * shape.dim * shape.hidden_dim,
        scores=8 * shape.tokens * shape.num_experts,
    )


def fused_kernels(shape: LayerShape, ranks: int = 1) -> list[Kernel]:
    """F2, without the exchange: `exchange_bytes` has that.

    Args:
        shape: of the layer.
        ranks: over which the experts are spread evenly; a rank then computes as many rows as it brings.
    """
    piece, num_up = _pieces(shape, ranks), shape.num_up
    token, row, hidden, weight = piece.token, piece.row, piece.hidden, piece.up
    product = 2.0 * shape.pairs * shape.dim * shape.hidden_dim
    router = 2.0 * shape.tokens * shape.dim * shape.num_experts
    shared = 2.0 * shape.tokens * shape.num_matrices * shape.dim * (shape.shared_hidden_dim or 0)
    kernels = [
        Kernel("router", router, token + piece.scores),
        Kernel("up", num_up * product, row + num_up * weight + num_up * hidden + hidden),
        Kernel("down", product, hidden + weight + row),
        Kernel("combine", 0, row + token),
        Kernel("down, gradient of rows", product, row + weight + (2 * num_up + 1) * hidden),
        Kernel("down, gradient of weights", product, row + hidden + weight),
        Kernel("up, gradient of rows", num_up * product, num_up * hidden + num_up * weight + row),
        Kernel("up, gradient of weights", num_up * product, row + num_up * hidden + num_up * weight),
        Kernel("gradient of tokens", 0, row + token),
        Kernel("router, gradients", 2 * router, 3 * token + piece.scores),
    ]
    # A dense block beside the experts: its weights are few, so its products alone count.
    return [*kernels, Kernel("shared expert", 3 * shared, 0)] if shared else kernels


def unfused_kernels(shape: LayerShape, ranks: int = 1) -> list[Kernel]:
    """F3: every operation reads and writes memory. ``ranks`` as in `fused_kernels`."""
    piece, num_up = _pieces(shape, ranks), shape.num_up
    token, row, hidden, weight = piece.token, piece.row, piece.hidden, piece.up
    product = 2.0 * shape.pairs * shape.dim * shape.hidden_dim
    router = 2.0 * shape.tokens * shape.dim * shape.num_experts
    shared = 2.0 * shape.tokens * shape.num_matrices * shape.dim * (shape.shared_hidden_dim or 0)
    activation = [2 * hidden, 3 * hidden] if shape.gated else [2 * hidden]
    activation_back = [3 * hidden] * (3 if shape.gated else 1)
    multiply = Kernel("product", product, row + weight + hidden)

    def moves(name: str, sizes: list[float]) -> list[Kernel]:
        return [Kernel(name, 0, size) for size in sizes]

    kernels = [
        *moves("gather", [2 * row]),
        *[multiply] * num_up,
        *moves("activation", activation),
        multiply,
        *moves("scale and combine", [2 * row, 2 * row, row + token]),
        *moves("combine and scale, gradients", [row + token, 2 * row, 2 * row, 2 * row]),
        *[multiply] * 2,
        *moves("activation, gradients", activation_back),
        *[multiply] * num_up,
        *moves("sum of rows' gradients", [3 * row] if shape.gated else []),
        *[multiply] * num_up,
        *moves("gather, gradient", [row + token]),
        Kernel("router", router, token + piece.scores),
        Kernel("router, gradients", 2 * router, 3 * token + piece.scores),
    ]
    return [*kernels, Kernel("shared expert", 3 * shared, 0)] if shared else kernels


def useful_flops(shape: LayerShape, pairs: float | None = None) -> float:
    """Of one rank's matrix products, forward and backward, without padding.

    Args:
        shape: of the layer.
        pairs: that are computed; None for all, nothing dropped.
    """
    computed = shape.pairs if pairs is None else pairs
    routed = 6.0 * computed * shape.num_matrices * shape.dim * shape.hidden_dim
    router = 6.0 * shape.tokens * shape.dim * shape.num_experts
    return routed + router + 6.0 * shape.tokens * shape.num_matrices * shape.dim * (shape.shared_hidden_dim or 0)


def exchange_bytes(shape: LayerShape, ranks: int) -> float:
    """That a rank sends to others per layer and step: dispatch, combine and their gradients, nothing dropped."""
    return 4.0 * shape.dtype.itemsize * shape.pairs * shape.dim * (ranks - 1) / ranks


def least_saved_bytes(shape: LayerShape) -> float:
    """Activations that backward cannot do without: the tokens, and what goes into the activation function."""
    return float(shape.dtype.itemsize * (shape.tokens * shape.dim + shape.num_up * shape.pairs * shape.hidden_dim))
