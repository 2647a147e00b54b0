"""What a MoE layer tells besides its output: returned, never left on the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

ROUTER_MEANS = ("router_entropy", "top_probability")
"""The Q columns of ``PackedReports.router_LQ``: means over tokens of H(p) / ln E and of the largest p."""

CountKey = tuple[int, str]
"""The place of a MoE layer in its model, and the name of one of its balance losses."""


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """What balance losses have counted of an optimizer step, over all ranks, besides the micro-step at hand.

    Handed from micro-step to micro-step by whoever runs them: a layer keeps nothing.

    Attributes:
        earlier: of the step's earlier micro-steps together.
        whole: of all its micro-steps, this one among them; empty unless a pass without gradient has counted them.
    """

    earlier: Mapping[CountKey, Tensor] = dataclasses.field(default_factory=dict)
    whole: Mapping[CountKey, Tensor] = dataclasses.field(default_factory=dict)

    def over_scope(self, key: CountKey, here: Tensor, whole: bool) -> Tensor:
        """The counts that a loss divides by: with those of ``here``, this micro-step's, or the whole step's where they
        are asked for and known."""
        if whole and key in self.whole:
            return self.whole[key]
        return here + self.earlier[key] if key in self.earlier else here

    def after(self, reports: Iterable[MoEReport]) -> StepCounts:
        """The same once another micro-step has said its counts."""
        added = {(report.layer, name): count for report in reports for name, count in report.counts.items()}
        summed = {key: count + self.earlier[key] if key in self.earlier else count for key, count in added.items()}
        return StepCounts({**self.earlier, **summed}, self.whole)


@dataclasses.dataclass(frozen=True)
class CountedMass:
    """What a layer's Switch loss is made of, group by group.

    Attributes:
        counts_GE: int64 pairs that each expert was asked for by the whole group.
        mass_GE: with gradient: probability of each expert, summed over the group's tokens in this micro-batch.
    """

    counts_GE: Tensor
    mass_GE: Tensor

    def loss(self) -> Tensor:
        """0-dim: ``E sum_G sum_i f_Gi mass_Gi``, f being shares of pairs; a sum over tokens."""
        share_GE = self.counts_GE.to(self.mass_GE.dtype) / self.counts_GE.sum(1, keepdim=True).clamp_min(1)
        return self.counts_GE.shape[1] * (share_GE * self.mass_GE).sum()


@dataclasses.dataclass(frozen=True)
class MoEReport:
    """One layer's account of one micro-batch on one rank.

    Attributes:
        layer: place of the layer in the model.
        losses: unscaled balance losses by name, 0-dim, fp32 or wider, with gradient: this rank's share, so that the
            sum over ranks and micro-batches is the value of the step.
        coefficients: 0-dim, what each loss is multiplied by, once, in the objective.
        pooled: this layer's part, divided by the valid tokens of the step, of losses that are taken over all layers
            together; `pool_losses` makes losses of them.
        counts: what losses of scope ``global`` have counted in this micro-step over all ranks, by name, without
            gradient; see `StepCounts`.
        observed: int64, what rules for the selection bias must know of this rank's micro-batch, by name; in training.
        router_entropy: 0-dim, without gradient: this rank's share of mean over tokens of H(p) / ln E.
        top_probability: likewise of the largest p.
        room: 0-dim int64, pairs that the limits of this micro-batch's capacity groups leave room for over all experts;
            0 where nothing limits.
        asked_E: int64 pairs per expert (global id) before any limit.
        kept_E: int64 pairs that each expert computed.
        dropped_ME: int64 pairs that asked for each expert and were computed by none, by reason (`DROP_REASONS`).
        spilled: 0-dim int64, pairs of this rank that count as kept and were left behind all the same, for want of room
            on the way: nothing of this pass may be used on any rank. None where that cannot be
            (`TokenContext.may_spill`).
    """

    layer: int
    losses: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    pooled: dict[str, CountedMass]
    counts: dict[str, Tensor]
    observed: dict[str, Tensor]
    router_entropy: Tensor
    top_probability: Tensor
    room: Tensor
    asked_E: Tensor
    kept_E: Tensor
    dropped_ME: Tensor
    spilled: Tensor | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class PackedReports:
    """The reports of L layers as two tensors, so that one reduce serves all layers.

    Attributes:
        names: the J names of the losses, over all layers.
        loss_LJ: unscaled shares with gradient; 0 where a layer lacks a loss.
        coefficient_LJ: their coefficients.
        router_LQ: shares of what `ROUTER_MEANS` names.
        room_L: int64, see `MoEReport.room`.
        count_LME: int64; M = 5: asked, kept, and dropped by each of the `DROP_REASONS`.
        observed: what rules for the selection bias must know, by name, of each layer.
    """

    names: tuple[str, ...]
    loss_LJ: Tensor
    coefficient_LJ: Tensor
    router_LQ: Tensor
    room_L: Tensor
    count_LME: Tensor
    observed: tuple[dict[str, Tensor], ...]

    def objective(self) -> Tensor:
        """0-dim: sum over layers and losses of coefficient x loss, this rank's share."""
        return (self.loss_LJ * self.coefficient_LJ).sum()


def pool_losses(reports: Sequence[MoEReport]) -> list[MoEReport]:
    """The reports of all MoE layers of a model, with a value for every loss that is taken over all of them together.

    Shares of pairs are those of all layers. A layer's value is its own probability's part, so that the mean over layers
    is the loss; its coefficient is divided by the number of layers, so that their sum is coefficient x loss.
    """
    pooled = list(reports)
    for name in dict.fromkeys(name for report in reports for name in report.pooled):
        places = [place for place, report in enumerate(reports) if name in report.pooled]
        counts_GE = torch.stack([reports[place].pooled[name].counts_GE for place in places]).sum(0)
        for place in places:
            report = pooled[place]
            loss = CountedMass(counts_GE, report.pooled[name].mass_GE).loss()
            coefficient = report.coefficients[name] / len(places)
            pooled[place] = dataclasses.replace(
                report,
                losses={**report.losses, name: loss},
                coefficients={**report.coefficients, name: coefficient},
            )
    return pooled


def pack_reports(reports: Sequence[MoEReport]) -> PackedReports:
    """Packs the reports of all MoE layers of a model (at least one), in their order."""
    reports = pool_losses(reports)
    names = tuple(dict.fromkeys(name for report in reports for name in report.losses))
    zero = reports[0].router_entropy.new_zeros(())
    loss_LJ = torch.stack([torch.stack([r.losses.get(name, zero) for name in names] or [zero]) for r in reports])
    weights = [[r.coefficients.get(name, zero) for name in names] or [zero] for r in reports]
    coefficient_LJ = torch.stack([torch.stack([w.to(zero.dtype) for w in row]) for row in weights])
    return PackedReports(
        names=names,
        loss_LJ=loss_LJ,
        coefficient_LJ=coefficient_LJ,
        router_LQ=torch.stack([torch.stack([getattr(r, name) for name in ROUTER_MEANS]) for r in reports]),
        room_L=torch.stack([r.room for r in reports]),
        count_LME=torch.stack([torch.stack([r.asked_E, r.kept_E, *r.dropped_ME]) for r in reports]),
        observed=tuple(r.observed for r in reports),
    )
