"""Random numbers by name instead of by state.

A draw is a pure function of (seed, step, layer, sample, position): it does not depend on which rank makes it, in what
order, whether for the second time (recomputation, resume), or on what was drawn before. A generator has a state, and
recomputation under activation checkpointing would meet another one and route other pairs.

The micro-step is not part of the name: a sample occurs once in a step, and the same sample may fall into another
micro-step on another number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moedist.moe.context import TokenContext

ROUTER_NOISE, RANDOM_DROP, INPUT_JITTER, FORCED, ATTENTION_DROP, FEATURES, OUTPUT_DROP = 1, 2, 3, 4, 5, 6, 7
"""Streams: draws of one name that must not be equal."""


def _signed(value: int) -> int:
    """``value`` modulo 2^64 as a signed number, as int64 arithmetic wraps it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 has no logical shift


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): a bijection of 64 bits in which every bit moves every bit."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def draw_uniform(ctx: TokenContext, num_columns: int, *, layer: int, stream: int) -> Tensor:
    """[T, num_columns] fp64, uniform on the open interval (0, 1), by name."""
    return uniform_by_name(ctx.seed, ctx.step, (layer, stream, ctx.sample_T, ctx.position_T), num_columns)


def uniform_by_name(seed: int, step: Tensor, parts: Sequence[int | Tensor], num_columns: int) -> Tensor:
    """[..., num_columns] fp64, uniform on the open interval (0, 1), by (seed, step, parts, column).

    Args:
        step: 0-dim int64.
        parts: the rest of the name; int64 tensors of shapes that broadcast to the leading dims.
    """
    state = _mix(step + _signed(_GOLDEN * (seed + 1)))
    for part in parts:
        state = _mix(state + (_GOLDEN * (part + 1) if isinstance(part, Tensor) else _signed(_GOLDEN * (part + 1))))
    column = torch.arange(1, num_columns + 1, device=state.device)
    state = _mix(state.unsqueeze(-1) + _GOLDEN * column)
    # 52 bits, because a half more than 53 of them would round to an end of the interval.
    return (_shift(state, 12).double() + 0.5) * 2.0**-52


def dropped_out(x_TD: Tensor, share: float, ctx: TokenContext, *, layer: int) -> Tensor:
    """Dropout by name (Srivastava et al. 2014): ``share`` of the elements are 0, the others ``1 / (1 - share)`` times
    what they were; ``x_TD`` itself outside of training."""
    if share == 0 or not ctx.training:
        return x_TD
    kept_TD = draw_uniform(ctx, x_TD.shape[1], layer=layer, stream=OUTPUT_DROP) >= share
    return torch.where(kept_TD, x_TD / (1 - share), 0)


def hash_columns(id_T: Tensor, num_columns: int, key: tuple[int, ...]) -> Tensor:
    """int64 [T, num_columns]: a number for each id and column that depends on the id and the key alone."""
    state_T = id_T
    for part in key:
        state_T = _mix(state_T + _signed(_GOLDEN * (part + 1)))
    column = torch.arange(1, num_columns + 1, device=id_T.device)
    return _mix(state_T[:, None] + _GOLDEN * column)


def draw_normal(ctx: TokenContext, num_columns: int, *, layer: int, stream: int) -> Tensor:
    """[T, num_columns] fp64, standard normal, by name (inverse of the normal distribution function)."""
    return math.sqrt(2) * torch.erfinv(2 * draw_uniform(ctx, num_columns, layer=layer, stream=stream) - 1)
