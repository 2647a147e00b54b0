"""What one optimizer step adds up to, over its micro-steps and then over the ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.log.metrics import ASKED, MoEStep, see_experts
from moedist.mesh import Axis
from moedist.mesh.collectives import all_max, all_sum
from moedist.moe.report import PackedReports


@dataclasses.dataclass(frozen=True)
class StepSum:
    """The whole global batch's numbers; ``moe`` is None for a model without MoE layers."""

    loss: float
    moe: MoEStep | None


class Tally:
    """Adds up shares on the device; asks the host and the other ranks in `reduce` only.

    Args:
        blocks: index of the block of each MoE layer.
        last_seen_LE: int64, the step at which each expert was last asked for, as far as this rank knows.
    """

    def __init__(self, blocks: tuple[int, ...], last_seen_LE: Tensor):
        self.blocks, self.last_seen_LE = blocks, last_seen_LE
        self.clear()

    def clear(self) -> None:
        """Begins a step."""
        self._loss: Tensor | None = None
        self._sum: PackedReports | None = None

    def add(self, loss: Tensor, reports: PackedReports | None) -> None:
        """One micro-step: this rank's share of the task loss and the packed reports."""
        loss = loss.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        if reports is None:
            return
        reports = dataclasses.replace(reports, loss_LJ=reports.loss_LJ.detach())
        if self._sum is not None:
            reports = dataclasses.replace(
                reports,
                loss_LJ=self._sum.loss_LJ + reports.loss_LJ,
                entropy_L=self._sum.entropy_L + reports.entropy_L,
                count_LME=self._sum.count_LME + reports.count_LME,
                observed=tuple(
                    {name: part + here[name] for name, part in so_far.items()}
                    for so_far, here in zip(self._sum.observed, reports.observed, strict=True)
                ),
            )
        self._sum = reports

    def see(self, step: int) -> None:
        """Ends a step: notes which experts this rank's tokens asked for."""
        if self._sum is not None:
            self.last_seen_LE = see_experts(self.last_seen_LE, self._sum.count_LME, step)

    def global_load(self, axis: Axis) -> Tensor:
        """int64 [L, E]: pairs that the step asked of each expert, over all ranks; called by all."""
        assert self._sum is not None, "a model without MoE layers"
        return all_sum(self._sum.count_LME[:, ASKED].clone(), axis)

    def global_observed(self, axis: Axis) -> list[dict[str, Tensor]]:
        """What each layer's rules for the selection bias observed in the step, by name, over all ranks, for one reduce;
        called by all."""
        assert self._sum is not None, "a model without MoE layers"
        layers = self._sum.observed
        parts = [part for layer in layers for part in layer.values()]
        if not parts:
            return [{} for _ in layers]
        sums = all_sum(torch.cat([part.flatten() for part in parts]), axis).split([part.numel() for part in parts])
        total = iter(sums)
        return [{name: next(total).view_as(part) for name, part in layer.items()} for layer in layers]

    def share_last_seen(self, axis: Axis) -> Tensor:
        """``last_seen_LE`` over all ranks; called by all."""
        return all_max(self.last_seen_LE, axis)

    def reduce(self, axis: Axis) -> StepSum:
        """The step's numbers over all ranks, for three reduces whatever the number of layers; called by all ranks."""
        assert self._loss is not None, "no micro-step was added"
        parts = [self._loss[None]]
        if self._sum is not None:
            parts += [self._sum.loss_LJ.double().flatten(), self._sum.entropy_L.double()]
        shares = all_sum(torch.cat(parts), axis)
        if self._sum is None:
            return StepSum(float(shares[0]), None)
        count_LME = all_sum(self._sum.count_LME.clone(), axis)
        loss_LJ, entropy_L = shares[1:].split([self._sum.loss_LJ.numel(), len(self.blocks)])
        moe = MoEStep(
            blocks=self.blocks,
            loss_names=self._sum.names,
            loss_LJ=loss_LJ.view(self._sum.loss_LJ.shape).cpu(),
            entropy_L=entropy_L.cpu(),
            count_LME=count_LME.cpu(),
            last_seen_LE=self.share_last_seen(axis).cpu(),
        )
        return StepSum(float(shares[0]), moe)
