"""A router around any module that scores tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moedist.moe.router.contract import RouterSite, wide
from moedist.moe.token_choice import TokenChoiceConfig, TokenChoiceRouter


class ModuleRouter(TokenChoiceRouter):
    """``logits = scorer(x)``, in fp32 or wider whatever the scorer's weights are.

    Args:
        scorer: from [T, D] to [T, E]; keeps its first values.
        config: what becomes of the logits.
        num_experts: E.
        dim: D.
        layer: names its noise.
    """

    def __init__(self, scorer: nn.Module, config: TokenChoiceConfig, num_experts: int, dim: int, layer: int = 0):
        super().__init__(config, RouterSite(dim, num_experts, layer))
        self.scorer = scorer

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """[T, E].

        Raises:
            ValueError: the scorer gave another shape.
        """
        narrow = {name: wide(p) for name, p in self.scorer.named_parameters() if p.dtype != wide(p).dtype}
        logits_TE = functional_call(self.scorer, narrow, (x_TD,)) if narrow else self.scorer(self._as_weights(x_TD))
        if logits_TE.shape != (x_TD.shape[0], self.num_experts):
            raise ValueError(
                f"the router made {list(logits_TE.shape)} of {list(x_TD.shape)}; it must give one score for each of "
                f"the {self.num_experts} experts: {[x_TD.shape[0], self.num_experts]}"
            )
        return wide(logits_TE)

    def _as_weights(self, x_TD: Tensor) -> Tensor:
        """fp32 vectors at fp64 weights, or the other way round, in the wider of the two."""
        weight = next((p for p in self.scorer.parameters() if p.is_floating_point()), x_TD)
        return x_TD.to(torch.promote_types(weight.dtype, x_TD.dtype))
