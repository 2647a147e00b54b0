"""How every parameter gets its first value: drawn by the parameter's name, on the CPU, in fp32.

The whole of a parameter (of stacked experts: of one expert) is drawn at a time and a rank keeps its piece of it, so the
host holds no more than the largest of them beside the model.

So the first value depends on the seed and the name alone: not on the order of building, the device, the dtype, or the
ranks that hold the parameter. An expert's name holds its global id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Xavier = Literal["xavier_normal", "xavier_uniform"]
"""How a matrix starts: normal or uniform, of standard deviation sqrt(2 / (rows + columns)) (Glorot and Bengio 2010)."""
XAVIER = {"xavier_normal": nn.init.xavier_normal_, "xavier_uniform": nn.init.xavier_uniform_}

Draw = Callable[[str], torch.Generator]
"""Gives a module the generator of a name relative to it: ``draw("weight")``, ``draw("expert.17.up")``."""


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose state is the first 64 bits of SHA-256 of ``seed/name``.

    >>> torch.rand((), generator=named_generator(0, "a")) == torch.rand((), generator=named_generator(0, "a"))
    tensor(True)
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def named_draw(seed: int, prefix: str = "") -> Draw:
    """The `Draw` of the module whose fully qualified name is ``prefix`` (empty for the root)."""
    return lambda name: named_generator(seed, f"{prefix}.{name}" if prefix else name)


def fill_xavier(parameter: Tensor, generator: torch.Generator, spread: Xavier) -> None:
    """`fill_xavier_normal` or `fill_xavier_uniform`."""
    _fill(parameter, lambda drawn: XAVIER[spread](drawn, generator=generator))


def fill_xavier_normal(parameter: Tensor, generator: torch.Generator) -> None:
    """Fills a matrix in place: normal, standard deviation sqrt(2 / (rows + columns)) (Glorot and Bengio 2010)."""
    fill_xavier(parameter, generator, "xavier_normal")


def fill_xavier_uniform(parameter: Tensor, generator: torch.Generator) -> None:
    """Fills a matrix in place: uniform within sqrt(6 / (rows + columns)) (Glorot and Bengio 2010)."""
    fill_xavier(parameter, generator, "xavier_uniform")


def _fill(parameter: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
    assert not parameter.is_meta, "a meta tensor has no storage to fill: call to_empty(device=...) first"
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    fill(drawn)
    fill_whole(parameter, drawn)


def fill_whole(parameter: Tensor, whole: Tensor) -> None:
    """Fills ``parameter`` in place from the value of the whole, of which it may be a piece (a DTensor)."""
    local, place = piece_of(parameter)
    with torch.no_grad():
        local.copy_(whole[place])


def piece_of(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The values that this rank holds, and where in the whole they lie."""
    if not isinstance(parameter, DTensor):
        return parameter, (slice(None),) * parameter.dim()
    shape, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    place = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
    return parameter.to_local(), place


def below(draw: Draw, child: str) -> Draw:
    """The `Draw` of a module's child."""
    return lambda name: draw(f"{child}.{name}")


def fill_normal(parameter: Tensor, generator: torch.Generator, std: float) -> None:
    """Fills ``parameter`` in place from a normal distribution cut at three ``std``.

    Any shape, floating dtype and device; the values are drawn on the CPU in fp32, then rounded to its dtype.
    """
    assert not parameter.is_meta, "a meta tensor has no storage to fill: call to_empty(device=...) first"
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
    fill_whole(parameter, drawn)
