"""Steps whose rows did not fit a budget (`moedist.moe.dispatch.budget`): found out, thrown away, run again with room.

Only the device knows that rows were left behind, and to ask it would be the wait that the budget saves. So such a
micro-step's loss becomes NaN on the device, and with it the step's gradient on every rank: what ranks agree on anyway
before an optimizer may move. No engine moves on a gradient that is no number, and the host sees the norm of each. Only
then does anybody ask why.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moedist.mesh import Axis
from moedist.mesh.collectives import all_sum
from moedist.model.contract import ModelOutput
from moedist.moe.layer import MoE


def may_spill(model: nn.Module) -> bool:
    """Whether some layer leaves rows behind where it may."""
    return any(isinstance(module, MoE) and module.bank.may_spill for module in model.modules())


class Spill:
    """What the passes of one attempt at a step have left behind on this rank.

    Args:
        allowed: whether they may.
    """

    def __init__(self, allowed: bool):
        self.allowed = allowed
        self._pairs: Tensor | None = None

    def add(self, output: ModelOutput) -> None:
        """One more pass."""
        for report in output.reports:
            if report.spilled is not None:
                self._pairs = report.spilled if self._pairs is None else self._pairs + report.spilled

    def spoil(self, loss: Tensor) -> Tensor:
        """``loss`` as it is, to the last bit, or NaN with a gradient of NaN where a pass has left pairs behind."""
        if self._pairs is None:
            return loss
        one = torch.ones((), dtype=loss.dtype, device=loss.device)
        return loss * one.masked_fill(self._pairs > 0, torch.nan)

    def happened(self, axis: Axis) -> bool:
        """Whether on any rank; the host waits. Called by all."""
        return self._pairs is not None and int(all_sum(self._pairs.clone(), axis)) > 0
