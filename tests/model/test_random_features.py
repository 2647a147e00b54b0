"""Positive random features against the moments that their source proves."""

from __future__ import annotations

import math

import pytest
import torch

from moedist.model.random_features import log_positive_features, normal_numbers, orthogonal_directions

DIM = 4
X, Y = torch.tensor([0.3, -0.5, 0.2, 0.4]).double(), torch.tensor([-0.1, 0.2, 0.6, 0.3]).double()


def directions(num: int, seed: int, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthogonal_directions(torch.randn(normal_numbers(num, dim), generator=generator, dtype=torch.float64), num)


def test_directions_are_orthogonal_within_blocks_and_as_long_as_normal_vectors():
    drawn = directions(10, 0)
    assert drawn.shape == (10, DIM)
    for block in drawn.split(DIM):
        product = block @ block.T
        torch.testing.assert_close(product, product.diagonal().diag(), rtol=0, atol=1e-12)
    many = directions(40_000, 1)
    torch.testing.assert_close(many.T @ many / 40_000, torch.eye(DIM).double(), rtol=0, atol=0.05)
    # Of a chi-squared distribution with DIM degrees of freedom: mean DIM, variance 2 DIM.
    squares = many.square().sum(1)
    assert abs(squares.mean() - DIM) < 0.06 and abs(squares.var() - 2 * DIM) < 0.4


def test_D14_features_estimate_the_exponential_of_the_scaled_product():
    """The original drew directions of variance 1 / d instead of scaling its inputs, which estimates another kernel
    (``wrong`` below). Features are unbiased, and orthogonal directions vary less than independent
    ones, whose relative variance is (exp(|x + y|^2 / sqrt(d)) - 1) / m."""
    num, rounds = 256, 60
    exact = math.exp(float(X @ Y) / math.sqrt(DIM))
    found = torch.stack(
        [
            (log_positive_features(X, drawn) + log_positive_features(Y, drawn)).exp().sum()
            for drawn in (directions(num, 100 + n) for n in range(rounds))
        ]
    )
    independent = exact * math.sqrt(math.expm1(float((X + Y).square().sum()) / math.sqrt(DIM)) / num)
    assert abs(found.mean() - exact) < 4 * independent / math.sqrt(rounds)
    assert found.std() < independent
    wrong = math.exp(float(X @ Y) / DIM - (1 - 1 / DIM) * float(X @ X + Y @ Y) / 2)
    assert abs(wrong - exact) > 20 * independent / math.sqrt(rounds)


@pytest.mark.parametrize("num", [64, 1024])
def test_weights_near_those_of_softmax_as_features_grow(num: int):
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(32, 16, generator=generator, dtype=torch.float64) / 2 for _ in range(2))
    drawn = directions(num, 5, 16)
    products = log_positive_features(query, drawn).exp() @ log_positive_features(key, drawn).exp().T
    error = (products / products.sum(1, keepdim=True) - (query @ key.T / 4).softmax(1)).abs().sum(1).mean()
    assert error < {64: 0.4, 1024: 0.1}[num]
