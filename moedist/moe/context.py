"""What a router and a capacity plan may know about the tokens besides their vectors."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moedist.moe.report import StepCounts


@dataclasses.dataclass(frozen=True)
class TokenContext:
    """The same argument for every router, plan and balance loss; one micro-batch of one rank.

    T = B * S positions, row by row.

    Attributes:
        id_T: int64 vocabulary ids (hash routers).
        valid_T: bool; false at padding, which takes no slot and enters no count, capacity or loss.
        sequence_T: int64 row of the micro-batch, 0 to ``num_sequences - 1`` (capacity group, balance scope).
        sample_T: int64 global sample index; with ``position_T`` it names a token in the whole run, wherever it is
            computed, so that noise drawn by name is the same at every layout.
        position_T: int64 place in the row.
        num_sequences: B; a shape, known to the host.
        num_tokens: 0-dim int64: valid tokens of the step's whole global batch. Each loss divides by it, so that the
            losses of all ranks and micro-batches add up to the loss of the step.
        seed: the run's seed.
        step: 0-dim int64: optimizer steps taken before this one.
        training: whether training-only parts (noise, jitter) act.
        counts: what balance losses have counted in the step's other micro-steps.
        may_spill: whether a dispatcher may leave rows behind that do not fit its budget. Who sets it promises to look
            at `MoEReport.spilled` on all ranks, and to throw away all that came of the pass where it is not 0.
    """

    id_T: Tensor
    valid_T: Tensor
    sequence_T: Tensor
    sample_T: Tensor
    position_T: Tensor
    num_sequences: int
    num_tokens: Tensor
    seed: int
    step: Tensor
    training: bool
    counts: StepCounts = dataclasses.field(default_factory=StepCounts)
    may_spill: bool = False

    @classmethod
    def of_rows(
        cls,
        num_sequences: int,
        length: int,
        *,
        device: torch.device | str = "cpu",
        id_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        sample_B: Tensor | None = None,
        num_tokens: Tensor | None = None,
        seed: int = 0,
        step: int | Tensor = 0,
        training: bool = True,
        counts: StepCounts | None = None,
        may_spill: bool = False,
    ) -> TokenContext:
        """The context of ``num_sequences`` rows of ``length`` positions; what is not given is a lone batch's own.

        >>> TokenContext.of_rows(2, 3).position_T.tolist()
        [0, 1, 2, 0, 1, 2]
        """
        row_B = torch.arange(num_sequences, device=device)
        position_S = torch.arange(length, device=device)
        valid_T = torch.ones(num_sequences * length, dtype=torch.bool, device=device) if valid_T is None else valid_T
        return cls(
            id_T=torch.zeros(num_sequences * length, dtype=torch.int64, device=device) if id_T is None else id_T,
            valid_T=valid_T,
            sequence_T=row_B.repeat_interleave(length, output_size=num_sequences * length),
            sample_T=(row_B if sample_B is None else sample_B).repeat_interleave(
                length, output_size=num_sequences * length
            ),
            position_T=position_S.repeat(num_sequences),
            num_sequences=num_sequences,
            num_tokens=valid_T.sum() if num_tokens is None else num_tokens,
            seed=seed,
            step=torch.as_tensor(step, dtype=torch.int64, device=device),
            training=training,
            counts=StepCounts() if counts is None else counts,
            may_spill=may_spill,
        )
