"""The one table that says how each parameter lies over the ranks; engines, the norm and the clip all read it.

Each rank's scalar is its share of the one global loss, so every gradient is a plain sum over the ranks that hold the
parameter, with no divisor anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from moedist.mesh import Axis
from moedist.mesh.collectives import all_sum

Role = Literal["router", "experts", "other"]

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed in flat pieces of about this size: a collective per parameter would be all latency."""


@dataclasses.dataclass(frozen=True)
class ParameterSpread:
    """How one parameter lies over the ranks.

    Attributes:
        role: for its learning rate.
        copies: the ranks that hold the same piece; its gradient is the sum over them.
        pieces: the ranks that hold the other pieces; the norm adds over them. None for a parameter held whole.
        summed_in_backward: whether backward itself sums over the copies (FSDP does).
    """

    role: Role
    copies: Axis
    pieces: Axis | None
    summed_in_backward: bool = False


@dataclasses.dataclass(frozen=True)
class GradientTable:
    """How every trainable parameter of a model lies.

    Attributes:
        spread_of: by name.
        device: where collectives run; gradients may lie on the host.
        cut_over: the lines of ranks over which parameters are cut, on some rank if not on this one; the norm adds over
            them in this order.
    """

    spread_of: dict[str, ParameterSpread]
    device: torch.device
    cut_over: tuple[Axis, ...] = ()

    def sum_copies(self, model: nn.Module) -> None:
        """Sums every gradient that backward has not summed over the ranks that hold a copy; in place."""
        by_axis: dict[tuple[Axis, torch.dtype], list[Tensor]] = {}
        for spread, grad in self._gradients(model):
            if spread.copies.size > 1 and not spread.summed_in_backward:
                by_axis.setdefault((spread.copies, grad.dtype), []).append(grad)
        for (axis, _), grads in by_axis.items():
            for bucket in _buckets(grads):
                flat = all_sum(_flatten_dense_tensors(bucket), axis)
                for grad, total in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                    grad.copy_(total)

    def norm(self, model: nn.Module) -> Tensor:
        """0-dim: the 2-norm of the whole model's (summed) gradient, each logical parameter counted once; equal on all
        ranks."""
        grads_of: dict[Axis | None, list[Tensor]] = {axis: [] for axis in (None, *self.cut_over)}
        for spread, grad in self._gradients(model):
            grads_of[spread.pieces].append(grad)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for axis, grads in grads_of.items():
            square = torch.zeros_like(total)
            if grads:
                square = torch.stack(torch._foreach_norm(grads)).double().square().sum().to(self.device)
            total = total + (square if axis is None else all_sum(square, axis))
        return total.sqrt()

    def scale(self, model: nn.Module, factor: float) -> None:
        """Multiplies every gradient by ``factor``; in place."""
        torch._foreach_mul_([grad for _, grad in self._gradients(model)], factor)

    def _gradients(self, model: nn.Module) -> Iterator[tuple[ParameterSpread, Tensor]]:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            grad = parameter.grad
            assert grad is not None, f"{name} took no part in the loss: every rank must give every parameter a gradient"
            yield self.spread_of[name], grad.to_local() if isinstance(grad, DTensor) else grad


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
