"""Attention by distance in hyperbolic space, around whose centre of mass a query's answer lies (Gulcehre et al. 2019,
"Hyperbolic Attention Networks"; Law et al. 2019 for the squared distance and the centroid)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import require
from moedist.model.attention.experts.contract import Attended, ExpertSite, Sight, masked_softmax
from moedist.model.attention.experts.standard import fused_attention
from moedist.model.heads import Heads, HeadsConfig, ProjectedExpert, join_heads
from moedist.model.lorentz import (
    BALL_REACH,
    LORENTZ_REACH,
    ball_distances,
    centroid,
    from_hyperboloid,
    limit_length,
    to_hyperboloid,
)
from moedist.moe.init import Draw
from moedist.moe.router.contract import wide

Score = Literal["geodesic", "squared_lorentz"]


@dataclasses.dataclass(frozen=True)
class HyperbolicConfig(HeadsConfig):
    """Hyperbolic attention. Rotary positions turn tangent vectors about the origin, which is an isometry.

    Attributes:
        curvature: of the space, below 0.
        learnable: whether the curvature is learned; one number for all heads.
        score: ``geodesic``: minus the distance of query and key; ``squared_lorentz``: minus their squared Lorentz
            distance, ``(2 / c) (cosh(sqrt(c) d) - 1)`` at the distance d, which is linear in a product of matrices and
            so never has B H Q S numbers at once. Both times an inverse temperature that each head learns, from 1 on.
        max_radius: bound of ``sqrt(c) |u|``, u being the tangent vector of a point; smooth, and without effect up to
            half of it. fp32 loses near the boundary what lies beyond.
    """

    curvature: float = -1.0
    learnable: bool = False
    score: Score = "geodesic"
    max_radius: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            -math.inf < self.curvature < 0,
            "curvature",
            self.curvature,
            "is no curvature of a hyperbolic space",
            "Set it below 0: -1.0 is usual, and near 0 the space is nearly flat.",
        )
        require(
            0 < self.max_radius <= 8,
            "max_radius",
            self.max_radius,
            "is not above 0, or so large that fp32 cannot tell points apart",
            "Set it to 4.0 or so.",
        )
        self.refuse("qk_norm", "norms put all points at one distance from the origin, which is what tells depths")

    def build(self, site: ExpertSite) -> HyperbolicExpert:  # noqa: D102
        return HyperbolicExpert(self, site)


class HyperbolicExpert(ProjectedExpert):
    """Attention among points of hyperbolic space.

    A head's vectors over the root of their width are tangent vectors at the origin, so that vectors of unit variance
    land at a like radius at every width; its output is a tangent vector times that root. Everything between is computed
    in fp32 or wider, also under autocast.

    Attributes:
        inverse_temperature_H: softplus of it multiplies the scores of each head.
        raw_curvature: [1], with ``learnable`` only: softplus of it is minus the curvature. fp32 or wider.
    """

    def __init__(self, config: HyperbolicConfig, site: ExpertSite):
        super().__init__(config, site)
        self.config = config
        self.inverse_temperature_H = site.parameter(site.num_heads)
        self.raw_curvature: nn.Parameter | None = None
        if config.learnable:
            dtype = torch.promote_types(site.dtype or torch.get_default_dtype(), torch.float32)
            self.raw_curvature = nn.Parameter(torch.empty(1, device=site.device, dtype=dtype))

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform matrices, inverse temperatures of 1, the curvature of the config."""
        super().init_weights(draw)
        nn.init.constant_(self.inverse_temperature_H, _softplus_inverse(1.0))
        if self.raw_curvature is not None:
            nn.init.constant_(self.raw_curvature, _softplus_inverse(-self.config.curvature))

    def negative_curvature(self) -> Tensor:
        """c, above 0."""
        if self.raw_curvature is not None:
            return F.softplus(wide(self.raw_curvature))
        device, dtype = self.query.device, torch.promote_types(self.query.dtype, torch.float32)
        return torch.full((1,), -self.config.curvature, device=device, dtype=dtype)

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, *, need_weights: bool = False
    ) -> Attended:
        """See the contract; edges are left aside."""
        heads = self.project(query_BQD, key_BSD, value_BSD, sight)
        dtype, root = heads.value_BHSh.dtype, self.site.head_dim**0.5
        with torch.autocast(query_BQD.device.type, enabled=False), _exact_products(query_BQD.is_cuda):
            c, beta_H = self.negative_curvature(), F.softplus(wide(self.inverse_temperature_H))
            tangents = Heads(*(limit_length(wide(x) / root, c, self.config.max_radius) for x in heads))
            if self.config.score == "squared_lorentz" and not need_weights and self.dropout == 0:
                points = lorentz_heads(tangents, c, beta_H)
                sums_BHQl = fused_attention(points, sight, query_BQD, key_BSD, scale=1.0)
                out_BHQh = from_hyperboloid(centroid(sums_BHQl, torch.ones_like(sums_BHQl[..., :1]), c), c)
                return Attended(join_heads(out_BHQh * root).to(dtype), None)
            score_BHQS = hyperbolic_scores(tangents, c, beta_H, self.config.score)
            if (bias := sight.bias()) is not None:
                score_BHQS = score_BHQS + bias.to(score_BHQS.dtype)
            weights_BHQS = masked_softmax(score_BHQS, sight.seen(query_BQD, key_BSD))
            weights_BHQS = self.drop(weights_BHQS, sight.names, sight.places(query_BQD))
            out_BHQh = hyperbolic_mean(weights_BHQS, tangents.value_BHSh, c, self.config.score)
        return Attended(join_heads(out_BHQh * root).to(dtype), weights_BHQS if need_weights else None)

    def score_flops(self, length: int) -> float:
        """Per dim and visible position (half of ``length``) 2 FLOPs for the sum of points, and for the score 3 (a
        difference, squared and added) or 2 (a product); a point of the hyperboloid has one dim more."""
        lifted = self.site.dim + self.site.num_heads
        score = 3 * self.site.dim if self.config.score == "geodesic" else 2 * lifted
        return (score + 2 * lifted) * length / 2


def hyperbolic_scores(tangents: Heads, c: Tensor, beta_H: Tensor, score: Score) -> Tensor:
    """[B, H, Q, S]: minus ``beta`` times the distance, or the squared Lorentz distance, of queries and keys.

    The tangent vectors belong to the ball for ``geodesic`` and to the hyperboloid for ``squared_lorentz``, as in the
    sources: the same vector lies twice as far out in the ball.
    """
    if score == "geodesic":
        return -beta_H[:, None, None] * ball_distances(tangents.query_BHQh, tangents.key_BHSh, c)
    points = lorentz_heads(tangents, c, beta_H)
    return points.query_BHQh @ points.key_BHSh.transpose(2, 3) + 2 * beta_H[:, None, None] / c


def hyperbolic_mean(weights_BHQS: Tensor, value_BHSh: Tensor, c: Tensor, score: Score) -> Tensor:
    """[B, H, Q, h]: tangent vectors of the Lorentz centroids of the points of ``value_BHSh``; zero where all weights
    are."""
    reach = BALL_REACH if score == "geodesic" else LORENTZ_REACH
    sums_BHQl = weights_BHQS @ to_hyperboloid(reach * value_BHSh, c)
    return from_hyperboloid(centroid(sums_BHQl, weights_BHQS.sum(3, keepdim=True), c), c) / reach


def lorentz_heads(tangents: Heads, c: Tensor, beta_H: Tensor) -> Heads:
    """Points of the hyperboloid whose plain products of query and key are the scores of ``squared_lorentz``, but for a
    constant of each head, which softmax does not see: ``-beta d_L^2 = 2 beta <q, k> + 2 beta / c``. A query's X_0 is
    negated, and it is multiplied by 2 beta.
    """
    query_BHQl, key_BHSl, value_BHSl = (to_hyperboloid(x, c) for x in tangents)
    query_BHQl = 2 * beta_H[:, None, None] * torch.cat([-query_BHQl[..., :1], query_BHQl[..., 1:]], dim=-1)
    return Heads(query_BHQl, key_BHSl, value_BHSl)


def _softplus_inverse(y: float) -> float:
    return y + math.log(-math.expm1(-y))


@contextlib.contextmanager
def _exact_products(is_cuda: bool) -> Iterator[None]:
    """fp32 matrix products without TensorFloat-32, whose 10 bits would move a distance of 0.1 by 0.1 at radius 2."""
    precision = torch.get_float32_matmul_precision()
    if not is_cuda or precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
