"""Runs a checkpoint over text and counts what its routers decide; called on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from moedist.analyze.counts import CorpusCounts, shared_choices
from moedist.data.contract import Source
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum
from moedist.model.contract import LanguageModel
from moedist.moe.layer import MoE
from moedist.moe.record import RoutingRecorder
from moedist.moe.trace import StepTrace
from moedist.train.config import RunConfig
from moedist.train.evaluate import held_out

EXCERPT_TOKENS = 2048
"""Tokens of each corpus that are shown as text, about."""

Choices = list[dict[int, Tensor]]
"""Of each micro-step and block: the choices [T, K] of all its tokens, int16."""


class Routers:
    """The routers of a model, on this rank's share of some corpora.

    Args:
        model: on its device, with this rank's experts.
        sources: opened corpora by name; their held-out parts are read, or ``train.eval_batches`` micro-steps of them.
        config: of the run.
        mesh: who the ranks are.
        beat: called before each micro-step.
    """

    def __init__(
        self,
        model: LanguageModel,
        sources: Mapping[str, Source],
        config: RunConfig,
        mesh: Mesh,
        beat: Callable[[], None] = lambda: None,
    ):
        self.model, self.sources, self.config, self.mesh, self.beat = model, sources, config, mesh, beat

    def count(self, step: int, keep: bool = True) -> tuple[dict[str, CorpusCounts], dict[str, Choices]]:
        """The counts of each corpus, over all ranks, and this rank's choices, to compare others with.

        Args:
            step: that the model has been trained for.
            keep: whether choices are wanted: they grow with the corpus, counts do not.
        """
        counts = {name: self._empty(source) for name, source in self.sources.items()}
        choices: dict[str, Choices] = {name: [] for name in self.sources}
        for name, source in self.sources.items():
            for trace in self._walk(source, step):
                counts[name].add(trace)
                if keep:
                    blocks = {block: layer.expert_TK.to(torch.int16) for block, layer in trace.layers.items()}
                    choices[name].append(blocks)
            counts[name].sum_over(self.mesh.dp, self.mesh.device)
        return counts, choices

    def count_shared(self, step: int, choices: Mapping[str, Choices]) -> dict[int, int]:
        """By block: the sum over all corpora's valid tokens of the experts that are in both sets of choices.

        Args:
            step: that the weights which the model now has were trained for.
            choices: of other weights, for the same tokens (`count`).
        """
        shared = dict.fromkeys(sorted(self.model.moe_blocks), 0)
        for name, source in self.sources.items():
            for trace, theirs in zip(self._walk(source, step), choices[name], strict=True):
                for block, layer in trace.layers.items():
                    shared[block] += shared_choices(layer, theirs[block].long(), trace.valid_T)
        total = all_sum(torch.tensor(list(shared.values()), device=self.mesh.device), self.mesh.dp)
        return dict(zip(shared, total.tolist(), strict=True))

    def _walk(self, source: Source, step: int) -> Iterator[StepTrace]:
        recorder = RoutingRecorder(self.model)
        with recorder.listening():
            for _ in held_out(self.model, source, self.config, self.mesh, step, self.beat):
                trace = recorder.take(step)
                assert trace is not None
                yield trace

    def _empty(self, source: Source) -> CorpusCounts:
        length = self.config.train.sequence_length
        rows = max(1, EXCERPT_TOKENS // length)
        return CorpusCounts.empty(layer_sizes(self.model), source.vocab_size, length, rows)


def layer_sizes(model: LanguageModel) -> dict[int, tuple[int, int]]:
    """Experts and choices per token of each MoE layer, by the index of its block."""
    configs = {layer.layer: layer.config for layer in model.modules() if isinstance(layer, MoE)}
    return {block: (moe.num_experts, moe.router.experts_per_token(moe.num_experts)) for block, moe in configs.items()}
