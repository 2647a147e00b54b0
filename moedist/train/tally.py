"""What one optimizer step adds up to, over its micro-steps and then over the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moedist.log.metrics import ASKED, MoEStep, max_vio, see_experts
from moedist.mesh import Axis
from moedist.mesh.collectives import all_max, all_sum
from moedist.moe.report import ROUTER_MEANS, PackedReports


@dataclasses.dataclass(frozen=True)
class StepSum:
    """The whole global batch's numbers; ``moe`` is None for a model without MoE layers, ``extra`` what was added."""

    loss: float
    moe: MoEStep | None
    extra: Mapping[str, Tensor]


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
        self._vio_LN: Tensor | None = None  # of each micro-batch by itself: sum of MaxVio, and how many were not empty

    def add(self, loss: Tensor, reports: PackedReports | None) -> None:
        """One micro-step: this rank's share of the task loss and the packed reports."""
        loss = loss.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        if reports is None:
            return
        reports = dataclasses.replace(reports, loss_LJ=reports.loss_LJ.detach())
        load_LE = reports.count_LME[:, ASKED].double()
        vio_LN = torch.stack([max_vio(load_LE), (load_LE.sum(1) > 0).double()], 1)
        self._vio_LN = vio_LN if self._vio_LN is None else self._vio_LN + vio_LN
        if self._sum is not None:
            reports = dataclasses.replace(
                reports,
                loss_LJ=self._sum.loss_LJ + reports.loss_LJ,
                router_LQ=self._sum.router_LQ + reports.router_LQ,
                room_L=self._sum.room_L + reports.room_L,
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

    def reduce(
        self, axis: Axis, sums: Mapping[str, Tensor] | None = None, maxima: Mapping[str, Tensor] | None = None
    ) -> StepSum:
        """The step's numbers over all ranks: one sum and one maximum, whatever the number of layers; called by all.

        Counts travel as fp64, which holds whole numbers up to 2^53.

        Args:
            axis: all ranks.
            sums, maxima: what else is to be added up, and of what the largest is to be found.
        """
        assert self._loss is not None, "no micro-step was added"
        parts = {"loss": self._loss, **(sums or {})}
        largest = {"last_seen_LE": self.last_seen_LE, **(maxima or {})}
        if self._sum is not None:
            assert self._vio_LN is not None
            parts |= {name: getattr(self._sum, name) for name in ("loss_LJ", "router_LQ", "room_L", "count_LME")}
            parts |= {"scaled_LJ": self._sum.loss_LJ * self._sum.coefficient_LJ, "vio_LN": self._vio_LN}
        found = across(parts, all_sum, axis) | (maxima_found := across(largest, all_max, axis))
        self.last_seen_LE.copy_(maxima_found["last_seen_LE"])
        moe = None
        if self._sum is not None:
            vio_L, busy_L = found["vio_LN"].unbind(1)
            moe = MoEStep(
                blocks=self.blocks,
                loss_names=self._sum.names,
                loss_LJ=found["loss_LJ"],
                scaled_LJ=found["scaled_LJ"],
                router_L=dict(zip(ROUTER_MEANS, found["router_LQ"].unbind(1), strict=True)),
                micro_vio_L=vio_L / busy_L.clamp(min=1),
                room_L=found["room_L"],
                count_LME=found["count_LME"],
                last_seen_LE=found["last_seen_LE"],
            )
        extra = {name: found[name] for name in (*(sums or {}), *(maxima or {}))}
        return StepSum(float(found["loss"]), moe, extra)


def across(parts: Mapping[str, Tensor], collective: Callable[[Tensor, Axis], Tensor], axis: Axis) -> dict[str, Tensor]:
    """Tensors of any shapes and number types, element by element over the ranks by one collective, on the host."""
    flat = collective(torch.cat([part.double().flatten() for part in parts.values()]), axis).cpu()
    pieces = flat.split([part.numel() for part in parts.values()])
    found = {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}
    return {name: piece if parts[name].is_floating_point() else piece.long() for name, piece in found.items()}
