"""What a router proposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moedist.config import Choice, ConfigError, require
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw


@dataclasses.dataclass(frozen=True)
class Routing:
    """Proposed pairs (token, expert, gate). N pairs; K exists only inside a router.

    Token choice gives N = T * K in token order, a token's choices in falling order of preference. Pairs of padding
    tokens stay in place; the plan ignores them.

    Attributes:
        token_N, expert_N: int64.
        gate_N: weight of the expert's output, fp32 or wider, with gradient.
        score_TE: unbiased scores, with gradient: who stays under ``drop_policy: probability``, and the gate of a pair
            that overflow sends to another expert.
        logits_TE: raw logits, without noise and of un-jittered vectors, fp32 or wider, with gradient (z-loss).
        probs_TE: the full distribution over experts, rows sum to 1, with gradient (balance losses).
        pairs_per_token: K where pair ``t * K + k`` is token t's choice k; None where pairs have another order.
        live_N: false at pairs that are there for the shape's sake only; None where all count.
        load_TE: the probability that fresh noise would choose each expert, with gradient; None without learned noise.
        capacity: upper bound of an expert's pairs, known from the shapes; None where there is none but the token count.
        allowed_TE: bool, experts that overflow may send a token's pairs to; None for all.
    """

    token_N: Tensor
    expert_N: Tensor
    gate_N: Tensor
    score_TE: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    pairs_per_token: int | None
    live_N: Tensor | None = None
    load_TE: Tensor | None = None
    capacity: int | None = None
    allowed_TE: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class RouterSite:
    """What a router is built for.

    Attributes:
        dim: width of the vectors that it looks at (D).
        num_experts: experts that it chooses from (E).
        layer: place of its layer in the model; names its noise.
        device, dtype: of its parameters; None for torch's own.
    """

    dim: int
    num_experts: int
    layer: int = 0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter without values."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))


class Router(nn.Module):
    """Scores tokens and proposes pairs.

    Attributes:
        num_experts: experts to choose from (E).
        layer: place of its layer in the model; names its noise.
        selection_bias: fp32 [E], added to the scores for the selection only, never to a gate; None until something that
            balances by a bias asks for it (`add_selection_bias`). A buffer: saved, and without gradient.
        has_first_choices: whether tokens choose, so that each has a first choice.
    """

    selection_bias: Tensor | None
    has_first_choices = True

    def __init__(self, site: RouterSite) -> None:
        super().__init__()
        self.num_experts, self.layer = site.num_experts, site.layer
        self.register_buffer("selection_bias", None)

    def add_selection_bias(self) -> None:
        """Begins with a bias of zero.

        Raises:
            ConfigError: this router has no selection that a bias could move.
        """
        raise ConfigError(
            "kind",
            type(self).__module__.rpartition(".")[2],
            "has no selection that a balancing bias could move",
            "Choose a token-choice router (topk, noisy, mlp, cosine), or a balance loss instead of the bias.",
        )

    def check_model(self, blocks: Sequence[int]) -> None:
        """Raises `ConfigError`, with the key's full name, where it cannot be the router of its layer in a model whose
        blocks ``blocks`` have MoE layers. Asked before a run starts."""

    def shortfall(self, routing: Routing) -> Tensor:
        """[T, E], without gradient: by how much each expert's biased score falls short of being chosen by each token;
        0 at the best one that was not chosen, below 0 at those chosen. Of routers with a `selection_bias`."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        """Proposes pairs for [T, D] vectors; leaves ``x_TD`` as it is."""
        raise NotImplementedError

    def init_weights(self, draw: Draw) -> None:
        """Fills the parameters and clears the bias."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves the bias with the module, but never casts it: in bf16 its small steps would be lost."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.selection_bias
            assert moved is not None
            self.selection_bias = (
                torch.empty_like(moved, dtype=torch.float32) if bias.is_meta else bias.to(moved.device)
            )
        return self


@dataclasses.dataclass(frozen=True)
class RouterConfig(Choice, path="moe.router"):
    """One way to choose experts."""

    def build(
        self,
        dim: int,
        num_experts: int,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """A router of [*, dim] vectors over ``num_experts``; see `RouterSite`.

        Raises:
            ConfigError: there is no width, or the choice does not fit ``num_experts``.
        """
        require(dim >= 1, "dim", dim, "is no width of vectors", "Set it to 1 or more.")
        return self.build_at(RouterSite(dim, num_experts, layer, device, dtype))

    def build_at(self, site: RouterSite) -> Router:
        """`build`, of which each choice says its own part here."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on no later token, and on no other row of the batch."""
        return True

    @property
    def draws_noise(self) -> bool:
        """Whether routing in training depends on numbers that are drawn anew at every step (`TokenContext.step`)."""
        return False

    @property
    def has_own_capacity(self) -> bool:
        """Whether the router itself bounds how many pairs an expert gets."""
        return False

    @property
    def label(self) -> str | None:
        """What every log line must say of this routing; None where it is what a model would really do."""
        return None

    def experts_per_token(self, num_experts: int) -> int:
        """Experts that a token runs through, for counts of active parameters."""
        raise NotImplementedError


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 where it is fp64: scores are never taken in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
