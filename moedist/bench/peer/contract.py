"""What a comparison needs of a contender."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from torch import Tensor, nn
from torch.nn import functional as F

from moedist.bench.trial import Trial

BALANCE = 0.01
"""Coefficient of balance losses: ours, and of peers whose layers make one."""


class Peer:
    """One contender.

    Attributes:
        name: by which it is asked for and shown.
        package: distribution that must be installed; None for none.
        module: that this is imported by; None for the package's own name.
        limits: whether it knows a capacity limit.
        spreads: whether its experts can lie on several ranks.
        needs_cuda: whether it has no other device.
        about: what is compared with, in a few words.
    """

    name: str
    package: str | None = None
    module: str | None = None
    limits = False
    spreads = False
    needs_cuda = False
    about = ""

    def why_not(self, trial: Trial) -> str | None:
        """Why it cannot take part, to be read behind its name; None where it can."""
        if self.package is not None and importlib.util.find_spec(self.module or self.package) is None:
            return "is not installed"
        if self.needs_cuda and trial.mesh.device.type != "cuda":
            return "needs a GPU"
        if not self.spreads and trial.mesh.ep.size > 1:
            return "keeps all experts on one rank"
        if trial.drops and not self.limits:
            return "knows no capacity limit, which drops pairs at this routing"
        return None

    def version(self) -> str | None:
        """Of the package."""
        return None if self.package is None else importlib.metadata.version(self.package)

    def build(self, trial: Trial) -> nn.Module:
        """A layer with fresh weights for a trial that it can take part in.

        Called with [T, D] it returns the output [T, D] and, behind it, any scalar losses that its training adds.
        """
        raise NotImplementedError


class FeedForward(nn.Module):
    """A feed-forward block as everybody writes it."""

    def __init__(self, trial: Trial, hidden_dim: int):
        super().__init__()
        shape = trial.shape

        def linear(width: int, out: int) -> nn.Linear:
            return nn.Linear(width, out, bias=False, device=trial.mesh.device, dtype=shape.dtype)

        self.up = linear(shape.dim, hidden_dim)
        self.gate = linear(shape.dim, hidden_dim) if shape.gated else None
        self.down = linear(hidden_dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[*, D] -> [*, D]."""
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


class WithShared(nn.Module):
    """Routed experts, and the shared one beside them where the shape has it.

    Args:
        trial: says so.
        routed: [T, D] -> the output and any losses.
    """

    def __init__(self, trial: Trial, routed: nn.Module):
        super().__init__()
        width = trial.shape.shared_hidden_dim
        self.routed, self.shared = routed, None if width is None else FeedForward(trial, width)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """The output, and behind it the losses."""
        out_TD, *losses = self.routed(x_TD)
        return out_TD if self.shared is None else out_TD + self.shared(x_TD), *losses


class PulledRouter(nn.Module):
    """A linear router as plain layers have it, pulled to the trial's experts: softmax, top k, weights that sum to 1."""

    def __init__(self, trial: Trial):
        super().__init__()
        shape = trial.shape
        self.map = nn.Linear(shape.dim, shape.num_experts, bias=False, device=trial.mesh.device, dtype=shape.dtype)
        self.offset_TE, self.top_k = trial.offset_TE, shape.top_k

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] in fp32."""
        return F.linear(x_TD.float(), self.map.weight.float()) + self.offset_TE

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T, K] each."""
        weight_TK, expert_TK = self.logits(x_TD).softmax(1).topk(self.top_k, dim=1)
        if self.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        return weight_TK, expert_TK
