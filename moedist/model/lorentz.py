"""Hyperbolic space of curvature -c in two models: where a tangent vector lands, how far apart, and around what centre.

Two models of one space: the Poincaré ball (|x|^2 < 1 / c) and the hyperboloid <X, X> = -1 / c of the Lorentz form
<X, Y> = -X_0 Y_0 + X_1 Y_1 + .... A point is named by the tangent vector u at the origin that leads to it, because that
vector keeps its digits where coordinates lose theirs, at the boundary. Each model has its own scale there: the ball's
map puts u at the distance 2 |u| from the origin, the hyperboloid's at |u|.

Sources: Ganea, Bécigneul, Hofmann 2018 (maps of the ball); Law, Liao, Snell, Zemel 2019 (the centroid).
Everything here expects fp32 or wider; gradients are finite everywhere, at zero and at coincident points too.
"""

from __future__ import annotations

import torch
from torch import Tensor

BALL_REACH, LORENTZ_REACH = 2.0, 1.0
"""Distance from the origin, per length of the tangent vector, of the point that each model's exponential map gives."""

_TINY = 1e-30
"""Below every square that counts, and above zero, where a root has no gradient."""


def length_of(x: Tensor) -> Tensor:
    """[..., 1]: Euclidean length, with the gradient 0 at zero."""
    return (x.square().sum(-1, keepdim=True) + _TINY).sqrt()


def limit_length(u: Tensor, c: Tensor, limit: float) -> Tensor:
    """``u`` [..., h], shortened so that ``sqrt(c) |u|`` stays below ``limit``; as it is up to half of that.

    Between, the length follows a hyperbolic tangent; value, slope and curvature are continuous.
    """
    half = limit / 2
    radius = c.sqrt() * length_of(u)
    shortened = half + half * torch.tanh((radius - half) / half)
    return u * torch.where(radius <= half, torch.ones_like(radius), shortened / radius)


def to_ball(u: Tensor, c: Tensor) -> Tensor:
    """exp_0(u) of the Poincaré ball: ``tanh(sqrt(c) |u|) / (sqrt(c) |u|) u``, [..., h]."""
    radius = c.sqrt() * length_of(u)
    return torch.tanh(radius) / radius * u


def to_hyperboloid(u: Tensor, c: Tensor) -> Tensor:
    """exp_0(u) of the hyperboloid, the coordinate X_0 first: [..., h] -> [..., h + 1]."""
    root = c.sqrt()
    radius = root * length_of(u)
    return torch.cat([torch.cosh(radius) / root, torch.sinh(radius) / radius * u], dim=-1)


def from_hyperboloid(X: Tensor, c: Tensor) -> Tensor:
    """log_0(X): the tangent vector that `to_hyperboloid` brings to X, [..., h + 1] -> [..., h]."""
    space = X[..., 1:]
    radius = c.sqrt() * length_of(space)
    return torch.asinh(radius) / radius * space


def ball_distances(u_Q: Tensor, v_S: Tensor, c: Tensor) -> Tensor:
    """[..., Q, S]: distances in the ball between exp_0 of ``u_Q`` [..., Q, h] and exp_0 of ``v_S`` [..., S, h].

    ``2 / sqrt(c) arsinh(sqrt(c) |x - y| / sqrt((1 - c |x|^2) (1 - c |y|^2)))``. Of the equal forms it is the one that
    keeps small distances (arcosh of 1 + t loses t) and has a gradient at coincident points (0). The two factors are
    1 / cosh^2 of the radii, taken from the tangent vectors, not as differences from 1; |x - y| is summed up from
    differences, not from a matrix product. Memory is that of the result.
    """
    root = c.sqrt()
    gap = torch.cdist(to_ball(u_Q, c), to_ball(v_S, c), compute_mode="donot_use_mm_for_euclid_dist")
    stretch_Q, stretch_S = torch.cosh(root * length_of(u_Q)), torch.cosh(root * length_of(v_S))
    return 2 / root * torch.asinh(root * gap * stretch_Q * stretch_S.transpose(-1, -2))


def centroid(sum_of_points: Tensor, sum_of_weights: Tensor, c: Tensor) -> Tensor:
    """The point of the hyperboloid in the direction of a weighted sum of points [..., h + 1], their Lorentz centroid.

    It does not depend on the scale of the weights, and is the Einstein midpoint and the Möbius gyromidpoint as well. A
    sum of no points stays zero.

    Args:
        sum_of_weights: [..., 1], none below zero. The Lorentz length of the sum is at least that (of two points, ``-c
            <X, Y>`` is the cosine of their distance), which holds it where far points leave of it only rounding.
        c: minus the curvature.
    """
    time, space = sum_of_points[..., :1], sum_of_points[..., 1:]
    square = c * (time.square() - space.square().sum(-1, keepdim=True))
    least = sum_of_weights.square().clamp_min(torch.finfo(square.dtype).tiny)
    return sum_of_points / torch.maximum(square, least).sqrt()
