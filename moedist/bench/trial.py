"""What every contender of a comparison gets: the same tokens, the same experts for them, the same gradient."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from moedist.bench.shapes import LayerShape
from moedist.config import require
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.plan import count
from moedist.moe.router.forced import ForcedConfig, ForcedRouter

Pattern = Literal["balanced", "zipf", "one_empty"]
PATTERNS: tuple[Pattern, ...] = ("balanced", "zipf", "one_empty")
PULL = 32.0
"""Added to the logit of the last wanted expert, and a little more to those before it: far above any logit of a router
with fresh weights, near enough that the softmax keeps gradients."""


def choose_patterns(names: str) -> tuple[Pattern, ...]:
    """The routings that a user names, with commas between them, or ``all``.

    Raises:
        ConfigError: there is none of the name.
    """
    if names == "all":
        return PATTERNS
    wanted = names.split(",")
    for name in wanted:
        remedy = f"Name some of {', '.join(PATTERNS)}, or all."
        require(name in PATTERNS, "--routing", name, "is not known", remedy)
    return tuple(pattern for pattern in PATTERNS if pattern in wanted)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One shape under one routing on one rank.

    Attributes:
        shape, pattern: which.
        factor: capacity factor; None for dropless.
        mesh: the ranks, over all of which the experts are spread.
        x_TD: the tokens.
        grad_TD: of the output.
        offset_TE: added by every contender to the logits of its own router, so that all choose the pattern's experts
            and none is spared the work of choosing.
        asked_E: int64 pairs of each expert, over all ranks.
        kept_E: the same under the capacity limit.
    """

    shape: LayerShape
    pattern: Pattern
    factor: float | None
    mesh: Mesh
    x_TD: Tensor
    grad_TD: Tensor
    offset_TE: Tensor
    asked_E: Tensor
    kept_E: Tensor

    @property
    def routing(self) -> str:
        """As every figure must name it."""
        return f"forced {self.pattern}"

    @property
    def drops(self) -> bool:
        """Whether the limit drops pairs."""
        return not torch.equal(self.asked_E, self.kept_E)

    @property
    def imbalance(self) -> float:
        """Largest over mean number of pairs of an expert, before any limit."""
        return (self.asked_E.max() / self.asked_E.double().mean()).item()

    @property
    def local_sizes(self) -> list[int]:
        """Rows that each of this rank's experts computes."""
        each = self.shape.num_experts // self.mesh.ep.size
        first = self.mesh.ep.rank * each
        return self.kept_E[first : first + each].tolist()


def make_trial(shape: LayerShape, pattern: Pattern, factor: float | None, mesh: Mesh) -> Trial:
    """Draws tokens and gradient by rank, and lets `moedist.moe.router.forced` choose; called by all ranks."""
    generator = torch.Generator().manual_seed(mesh.dp.rank)
    x_TD, grad_TD = (
        torch.randn(shape.tokens, shape.dim, generator=generator).to(mesh.device, shape.dtype) for _ in range(2)
    )
    router = ForcedConfig(pattern=pattern, top_k=shape.top_k).build(shape.dim, shape.num_experts, device=mesh.device)
    assert isinstance(router, ForcedRouter)
    samples = torch.arange(mesh.dp.rank, mesh.dp.rank + 1, device=mesh.device)
    ctx = TokenContext.of_rows(1, shape.tokens, device=mesh.device, sample_B=samples)
    logits_TE = torch.zeros(shape.tokens, shape.num_experts, device=mesh.device)
    expert_TK = router.select(logits_TE, logits_TE, None, ctx)
    pull_K = PULL + 0.25 * torch.arange(shape.top_k, 0, -1, device=mesh.device, dtype=torch.float32)
    offset_TE = logits_TE.scatter(1, expert_TK, pull_K.expand_as(expert_TK))
    asked_E = count(expert_TK.reshape(-1), shape.num_experts)
    # The limit is of each rank's own tokens, exactly as the layer's.
    kept_E = asked_E if factor is None else asked_E.clamp_max(rank_limit(shape, factor))
    return Trial(
        shape=shape,
        pattern=pattern,
        factor=factor,
        mesh=mesh,
        x_TD=x_TD.requires_grad_(),
        grad_TD=grad_TD,
        offset_TE=offset_TE,
        asked_E=all_sum(asked_E.clone(), mesh.dp),
        kept_E=all_sum(kept_E.clone(), mesh.dp),
    )


def rank_limit(shape: LayerShape, factor: float) -> int:
    """Pairs that an expert takes from one rank."""
    limit = CapacityConfig(factor=factor).limit(training=True)
    assert limit is not None
    return limit.of_shape(shape.tokens, shape.top_k, shape.num_experts)
