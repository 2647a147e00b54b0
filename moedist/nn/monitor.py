"""Whether experts become specialists: how often and how strongly each is used, over many steps."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.mesh import Axis
from moedist.nn.layer import MoELayer
from moedist.nn.usage import Usage

RARE = 0.1
"""An expert that gets less than this share of its even one is said to be collapsing."""
EVEN = 1.05
"""Routing is too uniform where a token's squared gates sum to less than this times those of even gates."""


@dataclasses.dataclass(frozen=True)
class ExpertStats:
    """Averages over steps; zeros before the first.

    Attributes:
        avg_usage: fp64 [E], tokens that used each expert in a step.
        avg_gates: fp64 [E], mean gate of each expert over all tokens of a step; they sum to 1 where a token's gates do.
    """

    avg_usage: Tensor
    avg_gates: Tensor


class ExpertSpecializationMonitor:
    """Adds up what routing did, step by step, over all data-parallel ranks.

    Args:
        num_experts: E.
        dp: the ranks whose tokens count together (``mesh.dp``); by default this process alone.

    Attributes:
        num_steps: updates so far.
    """

    def __init__(self, num_experts: int, dp: Axis = Axis("dp")):  # noqa: B008 (frozen)
        self.num_experts, self.dp = num_experts, dp
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.num_steps = 0
        self.usage_E = torch.zeros(self.num_experts, dtype=torch.float64)
        self.gates_E = torch.zeros(self.num_experts, dtype=torch.float64)
        self._squared_gates = self._num_tokens = 0.0

    def update(self, gates: Tensor | MoELayer) -> None:
        """Adds a step; collective over ``dp``.

        Args:
            gates: [..., E], 0 where a token does not use an expert; or a layer, whose last forward pass is taken.

        Raises:
            ValueError: another number of experts, or a layer that has not run.
        """
        usage = gates.usage if isinstance(gates, MoELayer) else Usage.of_gates(gates)
        if usage is None:
            raise ValueError("the layer has no forward pass to take: run it first, and before train() or eval()")
        if usage.tokens_E.numel() != self.num_experts:
            raise ValueError(f"gates of {usage.tokens_E.numel()} experts, and the monitor is for {self.num_experts}")
        usage = usage.over(self.dp)
        self.usage_E += usage.tokens_E.cpu()
        self.gates_E += (usage.weight_E / usage.num_tokens.clamp_min(1)).cpu()
        self._squared_gates += usage.squared_weight.item()
        self._num_tokens += usage.num_tokens.item()
        self.num_steps += 1

    def get_statistics(self) -> ExpertStats:
        """Averages per step."""
        steps = max(self.num_steps, 1)
        return ExpertStats(self.usage_E / steps, self.gates_E / steps)

    def warnings(self) -> list[str]:
        """What looks unhealthy, with what to try; nothing where all is well or nothing was seen."""
        total = self.usage_E.sum().item()
        if total == 0:
            return []
        found = []
        rare = (self.usage_E < RARE * total / self.num_experts).nonzero()[:, 0].tolist()
        if rare:
            found.append(
                f"collapse: experts {', '.join(map(str, rare))} of {self.num_experts} get less than {RARE:.0%} of an "
                "even share; raise aux_loss_weight (to 0.05 or 0.1), or take fewer experts"
            )
        experts_per_token = total / self._num_tokens
        if experts_per_token > 1.5 and self._squared_gates / self._num_tokens < EVEN / experts_per_token:
            found.append(
                "too uniform: a token's gates are nearly equal, so the router tells tokens apart little; lower "
                "aux_loss_weight (to 0.005), raise router_lr, or lower the router's temperature (to 0.5 to 0.8)"
            )
        return found
