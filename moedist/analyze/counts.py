"""Counts of routing decisions: integers, and sums over tokens, so that ranks may count apart and add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from moedist.mesh import Axis
from moedist.mesh.collectives import all_sum
from moedist.moe.trace import LayerTrace, StepTrace

POSITION_BINS = 32
"""Ranges of positions of equal width, at most, in which load is counted."""


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """What one MoE layer decided for some tokens.

    Attributes:
        top_k: K.
        pair_VE: int64, pairs of each vocabulary id and each expert.
        first_E: int64, tokens whose first choice the expert is.
        together_EE: int64, tokens that chose both experts; on the diagonal those that chose the one.
        position_PE: int64, pairs by range of positions (`position_bins`).
    """

    top_k: int
    pair_VE: Tensor
    first_E: Tensor
    together_EE: Tensor
    position_PE: Tensor

    @classmethod
    def empty(cls, vocab_size: int, num_experts: int, top_k: int, num_bins: int) -> LayerCounts:
        """No token seen."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        return cls(
            top_k,
            pair_VE=zeros(vocab_size, num_experts),
            first_E=zeros(num_experts),
            together_EE=zeros(num_experts, num_experts),
            position_PE=zeros(num_bins, num_experts),
        )

    def add(self, expert_TK: Tensor, id_T: Tensor, bin_T: Tensor) -> None:
        """Counts tokens, all of them valid.

        Args:
            expert_TK: int64 choices, the first one first.
            id_T: int64 vocabulary ids.
            bin_T: int64 ranges of positions.
        """
        num_experts = len(self.first_E)
        one_N = torch.ones(expert_TK.numel(), dtype=torch.int64)
        self.pair_VE.view(-1).index_add_(0, (id_T[:, None] * num_experts + expert_TK).flatten(), one_N)
        self.position_PE.view(-1).index_add_(0, (bin_T[:, None] * num_experts + expert_TK).flatten(), one_N)
        self.first_E.index_add_(0, expert_TK[:, 0], one_N[: len(expert_TK)])
        chosen_TE = torch.zeros(len(expert_TK), num_experts, dtype=torch.float64).scatter_(1, expert_TK, 1.0)
        self.together_EE.add_((chosen_TE.T @ chosen_TE).long())  # exact: fp64 holds integers up to 2^53


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The first rows of a corpus and what became of them.

    Attributes:
        id_BS: int64 vocabulary ids; -1 at padding.
        expert_BSK: int64 choices by the index of the block, the first one first; -1 at padding.
    """

    id_BS: Tensor
    expert_BSK: Mapping[int, Tensor]

    @classmethod
    def empty(cls, num_rows: int, length: int, top_k: Mapping[int, int]) -> Excerpt:
        """Nothing but padding."""

        def padding(*shape: int) -> Tensor:
            return torch.full((num_rows, length, *shape), -1, dtype=torch.int64)

        return cls(padding(), {block: padding(size) for block, size in top_k.items()})

    def add(self, trace: StepTrace) -> None:
        """Takes the rows over that belong to the excerpt."""
        num_rows, length = self.id_BS.shape
        row_T = trace.sample_T
        column_T = torch.arange(len(row_T)) % length  # a micro-batch is whole rows
        ours_T = trace.valid_T & (row_T < num_rows)
        place = row_T[ours_T], column_T[ours_T]
        self.id_BS[place] = trace.id_T[ours_T]
        for block, layer in trace.layers.items():
            self.expert_BSK[block][place] = layer.expert_TK[ours_T]


@dataclasses.dataclass
class CorpusCounts:
    """What the MoE layers decided for one corpus.

    Attributes:
        num_tokens: valid tokens.
        layers: by the index of the block, from 0.
        excerpt: its first rows.
        sequence_length: S, by which positions are cut into ranges.
    """

    num_tokens: int
    layers: Mapping[int, LayerCounts]
    excerpt: Excerpt
    sequence_length: int

    @classmethod
    def empty(cls, sizes: Mapping[int, tuple[int, int]], vocab_size: int, length: int, num_rows: int) -> CorpusCounts:
        """No token seen.

        Args:
            sizes: experts and choices per token of each MoE layer, by the index of its block.
            vocab_size: V.
            length: S, positions per row.
            num_rows: rows of the excerpt.
        """
        bins = position_bins(length)
        layers = {block: LayerCounts.empty(vocab_size, E, K, bins) for block, (E, K) in sizes.items()}
        excerpt = Excerpt.empty(num_rows, length, {block: K for block, (_, K) in sizes.items()})
        return cls(0, layers, excerpt, length)

    def add(self, trace: StepTrace) -> None:
        """Counts the valid tokens of a micro-step."""
        valid_T = trace.valid_T
        self.num_tokens += int(valid_T.sum())
        bin_T = trace.position_T[valid_T] * position_bins(self.sequence_length) // self.sequence_length
        for block, layer in trace.layers.items():
            self.layers[block].add(layer.expert_TK[valid_T], trace.id_T[valid_T], bin_T)
        self.excerpt.add(trace)

    def sum_over(self, axis: Axis, device: torch.device) -> None:
        """Makes the counts of all ranks everyone's. An excerpt's row lies on one rank and is padding on the others."""

        def total(tensor: Tensor) -> None:
            tensor.copy_(all_sum(tensor.to(device), axis))

        num_tokens = torch.tensor(self.num_tokens)
        total(num_tokens)
        self.num_tokens = int(num_tokens)
        for layer in self.layers.values():
            for tensor in (layer.pair_VE, layer.first_E, layer.together_EE, layer.position_PE):
                total(tensor)
        for tensor in (self.excerpt.id_BS, *self.excerpt.expert_BSK.values()):
            tensor.add_(1)
            total(tensor)
            tensor.sub_(1)


def position_bins(length: int) -> int:
    """Ranges that ``length`` positions are cut into."""
    return min(POSITION_BINS, length)


def shared_choices(ours: LayerTrace, theirs_TK: Tensor, valid_T: Tensor) -> int:
    """Sum over valid tokens of the number of experts in both of two sets of choices.

    >>> import torch
    >>> layer = LayerTrace(4, torch.tensor([[0, 1], [2, 3], [0, 3]]), torch.empty(3, 2), torch.empty(3, 2))
    >>> shared_choices(layer, torch.tensor([[1, 2], [3, 2], [0, 3]]), torch.tensor([True, True, False]))
    3
    """
    same_TKK = ours.expert_TK[valid_T][:, :, None] == theirs_TK[valid_T][:, None, :]
    return int(same_TKK.any(2).sum())
