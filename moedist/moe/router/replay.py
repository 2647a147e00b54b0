"""Replay of recorded routing (`moedist.moe.trace`): the experts of an earlier run, token by token.

A choice of its own beside `forced`: a pattern needs nothing but sizes, a replay has files, which are checked against
the model before a rank starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moedist.config import ConfigError, require
from moedist.moe.context import TokenContext
from moedist.moe.init import Draw
from moedist.moe.router.contract import Router, RouterSite
from moedist.moe.router.topk import TopKConfig, TopKRouter
from moedist.moe.trace import LayerSizes, TraceError, TraceIndex, open_trace, read_step


@dataclasses.dataclass(frozen=True)
class ReplayConfig(TopKConfig):
    """Experts from a trace, gates by the learned scores, so that the work and the gradients are those of training.

    A token is found by its name (sample, position), so that every number of ranks, expert-parallel size and
    accumulation replays the same decisions. Evaluations, whose tokens no trace holds, are routed by the learned scores.
    Every log line and record of such a run says so.

    Attributes:
        trace: a run folder, its ``traces`` folder, or the folder of one recorded step.
        cycle: what becomes of rows that were not recorded: they take the experts of recorded rows in turn (the row of
            sample s those of recorded sample number ``s`` modulo their count), whatever tokens they hold, so that a
            benchmark of any length runs on a few recorded steps; longer rows begin theirs anew. Without it the run
            ends at a row that was not recorded, or that held other tokens.
    """

    trace: str = dataclasses.field(kw_only=True)
    cycle: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mode == "top_k", "mode", self.mode, "leaves nothing to replay", "Set it to top_k.")
        require(self.groups is None, "groups", self.groups, "does not go with a replay", "Set it to null.")

    @property
    def label(self) -> str:
        """Named in every log line."""
        return "forced replay"

    def build_at(self, site: RouterSite) -> ReplayRouter:
        return ReplayRouter(self, site)


class ReplayRouter(TopKRouter):
    """The linear map of `topk`, a selection that does not look at it.

    Attributes:
        sample_A: int64, the recorded samples in rising order; A of them.
        expert_ASK: int32, the experts of their S positions; -1 where none was recorded.
        id_AS: int64, the vocabulary ids that stood there.
    """

    config: ReplayConfig
    sample_A: Tensor
    expert_ASK: Tensor
    id_AS: Tensor

    def add_selection_bias(self) -> None:
        """Refused: the trace selects."""
        Router.add_selection_bias(self)

    def check_model(self, blocks: Sequence[int]) -> None:
        """The trace must be of these layers, of as many experts and of as many choices."""
        try:
            index = open_trace(self.config.trace)
        except TraceError as error:
            raise self._refused(str(error), "Name a run folder with traces, or record one with log.trace.") from error
        mine = LayerSizes(self.num_experts, self.top_k)
        remedy = "Replay a trace of this model, or set the model's sizes to the trace's."
        if set(index.layers) != set(blocks):
            problem = f"has MoE layers in the blocks {sorted(index.layers)}, and the model in {sorted(blocks)}"
            raise self._refused(problem, remedy)
        theirs = index.layers[self.layer]
        if theirs != mine:
            problem = f"sends block {self.layer} to {theirs.top_k} of {theirs.num_experts} experts, and the model to "
            raise self._refused(f"{problem}{mine.top_k} of {mine.num_experts}", remedy)

    def _refused(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError("moe.router.trace", self.config.trace, f"cannot be replayed: {problem}", remedy)

    def init_weights(self, draw: Draw) -> None:
        """Fills the map, and reads this layer's part of the trace."""
        super().init_weights(draw)
        self._read(open_trace(Path(self.config.trace)))

    def _read(self, index: TraceIndex) -> None:
        steps = [read_step(files, [self.layer]) for files in index.steps.values()]
        sample_T, position_T, id_T = (
            torch.cat([getattr(step, name)[step.valid_T] for step in steps])
            for name in ("sample_T", "position_T", "id_T")
        )
        expert_TK = torch.cat([step.layers[self.layer].expert_TK[step.valid_T] for step in steps])
        if not sample_T.numel():
            raise TraceError(f"{self.config.trace} holds nothing but padding")
        sample_A, row_T = sample_T.unique(return_inverse=True)
        length = int(position_T.max()) + 1
        expert_ASK = torch.full((len(sample_A), length, self.top_k), -1, dtype=torch.int32)
        expert_ASK[row_T, position_T] = expert_TK.int()
        id_AS = torch.full((len(sample_A), length), -1, dtype=torch.int64)
        id_AS[row_T, position_T] = id_T
        device = self.weight.device
        for name, value in (("sample_A", sample_A), ("expert_ASK", expert_ASK), ("id_AS", id_AS)):
            self.register_buffer(name, value.to(device), persistent=False)

    def select(self, logits_TE: Tensor, score_TE: Tensor, allowed_TE: Tensor | None, ctx: TokenContext) -> Tensor:
        """The recorded experts in training; in evaluation those of the scores."""
        if not ctx.training:
            return super().select(logits_TE, score_TE, allowed_TE, ctx)
        num_rows, length, _ = self.expert_ASK.shape
        row_T = torch.searchsorted(self.sample_A, ctx.sample_T).clamp_max(num_rows - 1)
        known_T = self.sample_A[row_T] == ctx.sample_T
        known_T &= ctx.position_T < length
        position_T = ctx.position_T.clamp_max(length - 1)
        if self.config.cycle:
            row_T, known_T = torch.where(known_T, row_T, ctx.sample_T % num_rows), torch.ones_like(known_T)
            position_T = ctx.position_T % (self.expert_ASK[:, :, 0] >= 0).sum(1)[row_T]  # padding stands at the end
        expert_TK = self.expert_ASK[row_T, position_T].long()
        found_T = known_T & (expert_TK[:, 0] >= 0)
        same_T = (self.id_AS[row_T, position_T] == ctx.id_T) | self.config.cycle
        # Asked on the device: a wait for the answer would not be the training that is to be measured.
        torch._assert_async(
            (same_T | ~found_T | ~ctx.valid_T).all(),
            "moe.router.trace: a token has another id than when it was recorded. Replay with the seed, data and "
            "sequence length of the recorded run.",
        )
        torch._assert_async(
            (found_T | ~ctx.valid_T).all(),
            "moe.router.trace: a token of this batch was not recorded. Record the steps that are replayed (log.trace), "
            "or set moe.router.cycle=true to go round the recorded ones.",
        )
        return expert_TK.clamp_min(0)
