"""In which numbers rows travel: in their own, or in fewer bits.

Each row is rounded by itself, once on its way there and once on its way back, also where it does not leave its rank. So
what experts see, and what a token gets, depends neither on where experts live nor on who sends.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

ELEMENT_BYTES = {"bf16": 2, "fp8": 1}
SCALE_BYTES = {"bf16": 0, "fp8": 4}
"""Of a row."""
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
EXPONENT_BITS = 0x7F800000
"""Of an fp32 number; of one that is none, those of infinity."""

ExchangeDtype = Literal["bf16", "fp8"]


@dataclasses.dataclass(frozen=True)
class Wire:
    """The numbers of rows on their way. What is no wider than these travels as it is.

    Bounds, for an element x of a row whose largest magnitude is m:

    - ``bf16``: off by at most |x| / 256. Magnitudes from 3.4e38 on, which only fp64 and the last of fp32 hold, become
      infinite.
    - ``fp8`` (e4m3, with an fp32 power of two for each row): off by at most |x| / 16, or m / 229376 where that is more
      (elements below m / 14336; a row below 1e-35 may vanish). Scaling rounds nothing, and a finite row stays finite
      (of fp64 up to 1.5e41). A row with an infinity or NaN comes out as NaN, all of it.

    Gradients travel in bf16 with either: what forward loses is part of the function that is trained, what backward
    loses is not, and adds up over layers.

    Attributes:
        dtype: None for the rows' own.
    """

    dtype: ExchangeDtype | None = None

    @property
    def of_gradients(self) -> Wire:
        """For the gradients of what travels so."""
        return Wire("bf16") if self.dtype == "fp8" else self

    def narrows(self, element_bytes: int) -> bool:
        """Whether rows of such elements are rounded."""
        return self.dtype is not None and ELEMENT_BYTES[self.dtype] < element_bytes

    def row_bytes(self, dim: int, element_bytes: int) -> int:
        """On the way, for a row of ``dim`` elements."""
        if self.dtype is None or not self.narrows(element_bytes):
            return dim * element_bytes
        return dim * ELEMENT_BYTES[self.dtype] + SCALE_BYTES[self.dtype]

    def encode(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """Tensors [R, ...] that travel for ``x_RD``, side by side; the bytes of a row of each are a multiple of the
        first one's element."""
        if not self.narrows(x_RD.element_size()):
            return (x_RD,)
        if self.dtype == "bf16":
            return (x_RD.to(torch.bfloat16),)
        scale_R1 = scale_of(x_RD)
        return (x_RD / scale_R1).to(FP8).view(torch.uint8), scale_R1

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """[R, D] from what `encode` made of rows of ``dtype``."""
        first, *scale = parts
        if not scale:
            return first.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        largest = torch.finfo(dtype).max  # where the largest number of all was rounded up
        return (first.view(FP8).to(wide) * scale[0]).clamp(-largest, largest).to(dtype)


EXACT = Wire()
"""Rows in their own numbers."""


def scale_of(x_RD: Tensor) -> Tensor:
    """fp32 [R, 1]: the power of two that brings each row's largest magnitude to between half of fp8's largest number
    and all of it; infinite for a row with an element that is no number."""
    share_R1 = x_RD.abs().amax(1, keepdim=True).to(torch.float32) / LARGEST_FP8
    below_R1 = (share_R1.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return (2 * below_R1).clamp_min(torch.finfo(torch.float32).tiny)


class Rounded(torch.autograd.Function):
    """Rows as they would arrive; so is their gradient."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.decode(wire.encode(x_RD), x_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return rounded(grad_RD, ctx.wire.of_gradients), None


def rounded(x_RD: Tensor, wire: Wire) -> Tensor:
    """Rows that stay on their rank, as if they had travelled."""
    return Rounded.apply(x_RD, wire) if wire.narrows(x_RD.element_size()) else x_RD
