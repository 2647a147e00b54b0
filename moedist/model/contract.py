"""What every model is: tokens in, logits and one report per MoE layer out, written for one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moedist.config import Choice
from moedist.model.batch import TokenBatch
from moedist.moe.report import MoEReport, StepCounts

if TYPE_CHECKING:
    from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a forward pass knows about the step it belongs to.

    Attributes:
        seed: the run's seed.
        step: 0-dim int64: optimizer steps taken before this one.
        num_tokens: 0-dim int64: valid tokens of the step's whole global batch.
        training: whether training-only parts (noise, jitter) act.
        counts: what balance losses have counted in the step's other micro-steps.
        may_spill: see `TokenContext.may_spill`; the promise holds for the reports of all layers.
    """

    seed: int
    step: Tensor
    num_tokens: Tensor
    training: bool
    counts: StepCounts = dataclasses.field(default_factory=StepCounts)
    may_spill: bool = False


class ModelOutput(NamedTuple):
    """What a model returns. A named tuple, because wrappers that hook a module's output tensors look into tuples only.

    Attributes:
        logits_BSV: scores of the next token, in the dtype of the head's matmul.
        reports: one per MoE layer, in the order of ``model.moe_blocks``.
        attention_reports: one per attention that routes, in the order of ``model.attention_blocks``.
    """

    logits_BSV: Tensor
    reports: tuple[MoEReport, ...]
    attention_reports: tuple[MoEReport, ...] = ()


class LanguageModel(nn.Module):
    """The base of every model.

    Attributes:
        moe_blocks: index of the block (from 0) of each report.
        attention_blocks: the same of each report of an attention.
        looked_up: names of the parameters that are read by row and enter no matmul: an input embedding that is not the
            head as well.
    """

    moe_blocks: tuple[int, ...]
    attention_blocks: tuple[int, ...] = ()
    looked_up: tuple[str, ...] = ()

    def forward(self, batch: TokenBatch, context: StepContext) -> ModelOutput:
        """Runs one micro-batch of one rank."""
        raise NotImplementedError

    def units(self) -> Sequence[nn.Module]:
        """Parts that run one after the other and share no parameter, so that the whole weights of one at a time will
        do; what lies in none of them is needed throughout."""
        return ()


@dataclasses.dataclass(frozen=True)
class ModelConfig(Choice, path="model"):
    """One model family."""

    def check_spread(self, ep: int, ranks_per_node: int | None = None) -> None:
        """Raises `ConfigError` where a MoE layer that the model brings itself cannot be spread so; arguments as
        `MoEConfig.check_spread` has them."""

    def check_alike(self, reason: str) -> None:
        """Raises `ConfigError` where ranks would hold unlike parameters, which ``reason`` forbids."""

    def check_order(self, reason: str) -> None:
        """Raises `ConfigError` where gradients may arrive in another order on each rank, which ``reason`` forbids."""

    def build(
        self,
        vocab_size: int,
        moe: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LanguageModel:
        """Builds the model, with the first values of seed 0 unless it is on the meta device.

        Args:
            vocab_size: number of token ids (V).
            moe: the run's MoE layer, for every block that does not bring its own.
            device: where; ``meta`` for a model without storage.
            dtype: of all parameters; None for torch's default.

        Raises:
            ConfigError: sizes that do not fit together.
        """
        raise NotImplementedError
