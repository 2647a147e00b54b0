"""Hyperbolic space against geoopt and the numbers of its formulas."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from torch import Tensor

from moedist.model.lorentz import (
    BALL_REACH,
    ball_distances,
    centroid,
    from_hyperboloid,
    length_of,
    limit_length,
    to_ball,
    to_hyperboloid,
)
from tests.model.attention.experts.made import golden, rows

CURVATURES = [0.5, 1.0, 2.0]


def number(value: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def from_ball(x: Tensor, c: Tensor) -> Tensor:
    """log_0 of the ball."""
    radius = c.sqrt() * x.norm(dim=-1, keepdim=True).clamp_min(1e-15)
    return torch.atanh(radius) / radius * x


def close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("c", CURVATURES)
def test_maps_and_distances_are_geoopts(c: float):
    ball, u = geoopt.PoincareBall(c=c).double(), rows(20, 3) / 2
    x, c_ = to_ball(u, number(c)), number(c)
    close(x, ball.expmap0(u), 1e-7)  # geoopt clamps norms
    inside = math.sqrt(c) * x.norm(dim=1) < 0.9  # nearer the boundary geoopt clamps
    assert inside.sum() > 5
    v = u[inside]
    close(ball_distances(v, v, c_), ball.dist(x[inside][:, None], x[inside][None]), 1e-6)
    lorentz = geoopt.Lorentz(k=1 / c).double()
    close(to_hyperboloid(u, c_), lorentz.expmap0(torch.cat([torch.zeros(20, 1), u], 1).double()), 1e-9)
    close(from_hyperboloid(to_hyperboloid(u, c_), c_), u, 1e-12)
    X = to_hyperboloid(u, c_)
    close(X[:, 0] ** 2 - X[:, 1:].square().sum(1), torch.full((20,), 1 / c).double(), 1e-9)


@pytest.mark.parametrize("c", CURVATURES)
def test_D16_the_centroid_is_geoopts_midpoint(c: float):
    """The original's midpoint was off by 0.035 (c = 1) and 0.12 (c = 2)."""
    c_, u, weights = number(c), rows(6, 3) / 2, rows(4, 6, seed=1).softmax(1)
    points = to_ball(u, c_)
    expected = (
        geoopt.PoincareBall(c=c)
        .double()
        .weighted_midpoint(points.expand(4, 6, 3), weights, reducedim=[1], lincomb=False, posweight=False)
    )
    sums = weights @ to_hyperboloid(BALL_REACH * u, c_)
    got = from_hyperboloid(centroid(sums, weights.sum(1, keepdim=True), c_), c_) / BALL_REACH
    close(to_ball(got, c_), expected, 1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_single_precision_keeps_the_centroid_of_points_at_the_limit(scale: float):
    """Their sum's Lorentz length is the difference of two numbers of a million, which can come out as anything."""
    c, weights = number([1.0]), scale * rows(4, 64, seed=1).abs()
    u = limit_length(50 + 1e-3 * rows(64, 16), c, 4.0)

    def mean(u: Tensor, weights: Tensor, c: Tensor) -> Tensor:
        sums = weights @ to_hyperboloid(BALL_REACH * u, c)
        return from_hyperboloid(centroid(sums, weights.sum(1, keepdim=True), c), c) / BALL_REACH

    exact, got = mean(u, weights, c), mean(u.float(), weights.float(), c.float()).double()
    assert ((got - exact).norm(dim=1) < 0.1 * exact.norm(dim=1)).all()


def test_golden_midpoint_invariant_to_the_scale_of_weights_and_that_of_equal_points():
    c, numbers = number(1.0), golden()["space"]["midpoint"]
    u = from_ball(number(numbers["points"]), c)
    points = to_hyperboloid(BALL_REACH * u, c)
    for scale in (1.0, 7.0, 1e-3):
        sums = scale * number(numbers["weights"]) @ points
        got = to_ball(from_hyperboloid(centroid(sums, number([scale]), c), c) / BALL_REACH, c)
        close(got, number(numbers["x"]), 1e-9)
    assert sum(numbers["weights"]) == 1
    same = points[:1].expand(3, -1)
    close(centroid(number([0.2, 0.5, 0.3]) @ same, number([1.0]), c), points[0], 1e-12)
    assert not centroid(torch.zeros(3), torch.zeros(1), c).any()


def test_golden_distances_and_exp_0():
    for case in golden()["space"]["distances"]:
        c = number(float(case["c"]))
        u, v = (from_ball(number(case[key])[None], c) for key in "xy")
        close(ball_distances(u, v, c)[0, 0], number(case["d"]), 1e-9)
    case = golden()["space"]["exp_0"]
    close(to_ball(number(case["u"]), number(1.0)), number(case["x"]), 1e-9)


def test_D15_a_point_lies_as_far_away_as_its_tangent_vector_is_long():
    """exp_x(v) is at the distance 2 |v| / (1 - c |x|^2) from x, not at half of it, where the original put it."""
    case, c = golden()["space"]["exp"], number(1.0)
    x, v, y = (number(case[key]) for key in "xvy")
    expected = 2 / (1 - x.square().sum()) * v.norm()
    u, w = from_ball(x[None], c), from_ball(y[None], c)
    close(ball_distances(u, w, c)[0, 0], expected, 1e-8)
    wrong = from_ball(number([[0.399, -0.068]]), c)
    assert (ball_distances(u, wrong, c)[0, 0] - expected).abs() > 0.3
    # The same at the origin, where the experts' map starts.
    for length in (1e-3, 0.5, 3.0):
        u = number([[length, 0.0]])
        close(ball_distances(torch.zeros_like(u), u, c)[0, 0], number(2 * length), 1e-9)


def test_the_distance_is_symmetric_and_obeys_the_triangle():
    c, u = number(1.3), rows(12, 3)
    d = ball_distances(u, u, c)
    close(d, d.T, 1e-12)
    assert (d >= 0).all() and not d.diagonal().any()
    assert (d[:, :, None] <= d[:, None, :] + d.T[None] + 1e-12).all()


def test_flat_space_is_the_limit():
    x, y, flat = number([[0.3, 0.1]]), number([[-0.2, 0.4]]), number(2 * math.hypot(0.5, 0.3))
    close(
        ball_distances(from_ball(x, number(1e-6)), from_ball(y, number(1e-6)), number(1e-6))[0, 0],
        number(1.16619048781),
        1e-9,
    )
    close(ball_distances(x, y, number(1e-12))[0, 0], flat, 1e-9)
    w, u = number([0.3, 0.7]), number([[0.4, 0.1], [-0.2, 0.6]])
    sums = w @ to_hyperboloid(u, number(1e-9))
    mean = from_hyperboloid(centroid(sums, number([1.0]), number(1e-9)), number(1e-9))
    close(mean, w @ u, 1e-8)


@pytest.mark.parametrize("radius", [1.0, 2.0, 4.0])
def test_single_precision_keeps_small_distances_far_out(radius: float):
    """Of a distance of 0.1 between points at twice this radius."""
    c = number(1.0)
    u = number([[radius, 0.0]]) / 1.0
    v = number([[radius, 0.0]]) - number([[0.05, 0.0]])
    exact = ball_distances(u, v, c)
    got = ball_distances(u.float(), v.float(), c.float())
    close(got.double(), exact, {1.0: 2e-6, 2.0: 1e-5, 4.0: 3e-4}[radius])


def test_gradients_are_finite_at_zero_at_coincidence_and_at_the_boundary():
    c = number(1.0, torch.float32).requires_grad_()
    for u in (torch.zeros(1, 2), torch.full((1, 2), 1e-20), torch.full((1, 2), 0.3), torch.full((1, 2), 100.0)):
        x, y = u.clone().requires_grad_(), u.clone().requires_grad_()
        short, other = limit_length(x, c, 4.0), limit_length(y, c, 4.0)
        total = ball_distances(short, other, c).sum()
        sums = to_hyperboloid(short, c) + to_hyperboloid(other, c)
        total = total + from_hyperboloid(centroid(sums, torch.tensor([2.0]), c), c).sum()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(total, [x, y, c]))


def test_lengths_are_limited_smoothly():
    u = torch.linspace(0.01, 12, 600, dtype=torch.float64)[:, None].requires_grad_()
    for c in (0.25, 1.0, 4.0):
        got = limit_length(u, number(c), 4.0)
        radius = math.sqrt(c) * got
        assert (radius < 4).all() and (radius.diff(dim=0) >= 0).all()
        low = math.sqrt(c) * u <= 2
        assert torch.equal(got[low], u[low])
        slope = torch.autograd.grad(got.sum(), u)[0]
        assert (slope.diff(dim=0).abs() < 0.03 * max(1.0, math.sqrt(c))).all()
    assert length_of(torch.zeros(2, 3)).isfinite().all()
