"""Positive features whose inner products are, on average, exponentials of inner products: FAVOR+ (Choromanski et al.
2021, "Rethinking Attention with Performers", lemma 1 and section 2.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_numbers(num_directions: int, dim: int) -> tuple[int, int]:
    """Shape of the standard normal numbers that `orthogonal_directions` is made from."""
    return -(-num_directions // dim) * dim, 2 * dim


def orthogonal_directions(normal: Tensor, num_directions: int) -> Tensor:
    """[num_directions, dim] random directions, each alone distributed as N(0, I), orthogonal within blocks of ``dim``.

    Args:
        normal: standard normal numbers of the shape that `normal_numbers` says.
    """
    dim = normal.shape[1] // 2
    blocks, lengths = normal[:, :dim].unflatten(0, (-1, dim)), normal[:num_directions, dim:].norm(dim=1)
    direction, upper = torch.linalg.qr(blocks)
    # The signs of the diagonal make the distribution uniform over rotations (Mezzadri 2007).
    direction = direction * upper.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return direction.transpose(1, 2).flatten(0, 1)[:num_directions] * lengths[:, None]


def log_positive_features(x: Tensor, directions_mh: Tensor) -> Tensor:
    """[..., m]: logarithms of the features phi of ``x`` [..., h], with E[phi(x) . phi(y)] = exp(x . y / sqrt(h)).

    ``phi(x) = m^(-1/2) exp(w x' - |x'|^2 / 2)`` with ``x' = x h^(-1/4)`` and the rows w of ``directions_mh``.
    """
    num_features, dim = directions_mh.shape
    x = x * dim**-0.25
    return x @ directions_mh.T - x.square().sum(-1, keepdim=True) / 2 - math.log(num_features) / 2
