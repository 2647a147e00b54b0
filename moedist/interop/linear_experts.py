"""Stacked experts of two matrices to and from a pair of `torch.nn.Linear` for each.

    stacked                              one expert's linear maps
    up    [E, D, F]   up_bias   [E, F]   <id>.fc1.weight [F, D]   <id>.fc1.bias [F]
    down  [E, F, D]   down_bias [E, D]   <id>.fc2.weight [D, F]   <id>.fc2.bias [D]

The names on the left are those of `moedist.moe.ffn.StackedFFN` with ``activation: relu`` or ``gelu``; a linear map
stores the transpose of the matrix that it multiplies with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LINEAR_OF = {"up": "fc1.weight", "up_bias": "fc1.bias", "down": "fc2.weight", "down_bias": "fc2.bias"}
KEY = re.compile(r"(\d+)\.(fc[12]\.(?:weight|bias))")


def to_linears(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of E pairs of linear maps, by global id, from a state dict of stacked experts.

    Raises:
        ValueError: a name is none of a two-matrix expert (``gate``, of swiglu, has no place in a pair).
    """
    unknown = sorted(stacked.keys() - LINEAR_OF.keys())
    if unknown:
        raise ValueError(f"two linear maps hold {list(LINEAR_OF)}; there is no place for {unknown}")
    return {
        f"{expert}.{LINEAR_OF[name]}": (row.mT if row.dim() == 2 else row).clone(memory_format=torch.contiguous_format)
        for name, value in stacked.items()
        for expert, row in enumerate(value)
    }


def from_linears(linears: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a state dict for stacked experts.

    Raises:
        ValueError: a name is not ``<id>.fc1.weight`` or alike, an expert is missing or has other parts, or shapes
            differ.
    """
    names = {linear: name for name, linear in LINEAR_OF.items()}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in linears.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no parameter of an expert; they are called <id>.fc1.weight, <id>.fc2.bias")
        parts.setdefault(names[match[2]], {})[int(match[1])] = value
    num_experts = 1 + max((expert for part in parts.values() for expert in part), default=-1)
    stacked = {}
    for name, part in parts.items():
        missing = sorted(set(range(num_experts)) - part.keys())
        if missing:
            raise ValueError(f"of {num_experts} experts, {missing} have no {LINEAR_OF[name]}")
        shapes = {tuple(value.shape) for value in part.values()}
        if len(shapes) > 1:
            raise ValueError(f"{LINEAR_OF[name]} has unlike shapes: {sorted(shapes)}")
        rows = [part[expert] for expert in range(num_experts)]
        stacked[name] = torch.stack([row.mT if row.dim() == 2 else row for row in rows]).contiguous()
    return stacked
