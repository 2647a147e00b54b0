"""What an attention expert is: a module that gives query rows what they take from a whole sequence of keys and values.

Experts of any kinds stand in one list and are told apart by their place in it, the expert's global id. An expert has no
projection behind it: the mixture has one for all of them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moedist.config import Choice, require
from moedist.model.norm.contract import NormConfig
from moedist.moe.init import Draw


@dataclasses.dataclass(frozen=True)
class SparseEdges:
    """Features of some pairs (query, key); those of all other pairs are zero. Which pairs see each other is said by
    `Sight.mask_BHQS` alone.

    Attributes:
        sequence_M, query_M, key_M: int64, the pair of each of the M edges; an edge whose query is -1 is none.
        feature_Me: their features.
    """

    sequence_M: Tensor
    query_M: Tensor
    key_M: Tensor
    feature_Me: Tensor

    def dense(self, num_sequences: int, num_queries: int, num_keys: int) -> Tensor:
        """[B, Q, S, d_e]; edges of one pair add up.

        Raises:
            IndexError: an edge names a sequence, query or key that is not there (on a GPU: its own error).
        """
        whole = self.feature_Me.new_zeros(num_sequences, num_queries, num_keys, self.feature_Me.shape[1])
        feature_Me = self.feature_Me.masked_fill((self.query_M < 0)[:, None], 0)
        place = (self.sequence_M, self.query_M.clamp_min(0), self.key_M)
        return whole.index_put(place, feature_Me, accumulate=True)


@dataclasses.dataclass(frozen=True)
class RowNames:
    """What names a query row of one expert in the whole run, beside its place: what is random there is drawn by name.

    Attributes:
        seed: the run's.
        step: 0-dim int64: optimizer steps taken before this one.
        layer: place of the layer in its model.
        expert: the expert's global id.
        sample_B: int64 global sample index of each sequence.
    """

    seed: int
    step: Tensor
    layer: int
    expert: int
    sample_B: Tensor


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys each query row sees, and what is known about the pair.

    Attributes:
        causal: whether a query sees only keys up to its own place.
        place_BQ: int64, place of each query row among the keys; None where row q stands at key q. A mixture hands an
            expert some of a sequence's rows, in any order and some of them twice.
        num_places: with ``place_BQ``: places that a row can have; None for as many as there are keys.
        key_valid_BS: bool, false at keys that nobody sees (padding); None for all.
        document_BS: int64, document of each key; a query sees its own only, which is that of the key at its place. None
            for one.
        mask_BHQS: bool, true where the query sees the key, or floating, added to the scores; [B or 1, H or 1, Q, S].
        edges: features of the pairs, [B, Q, S, d_e] or `SparseEdges`; None for none.
        names: of the rows, for what is random; None where a generator's state will do.
    """

    causal: bool = False
    place_BQ: Tensor | None = None
    num_places: int | None = None
    key_valid_BS: Tensor | None = None
    document_BS: Tensor | None = None
    mask_BHQS: Tensor | None = None
    edges: Tensor | SparseEdges | None = None
    names: RowNames | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but ``causal`` stands between a query and a key: row q is key q, no mask, no padding."""
        limits = (self.place_BQ, self.key_valid_BS, self.document_BS, self.mask_BHQS)
        return all(limit is None for limit in limits)

    def places(self, query_BQD: Tensor) -> Tensor:
        """int64 [B, Q]: ``place_BQ``, or the rows' own numbers."""
        if self.place_BQ is not None:
            return self.place_BQ
        return torch.arange(query_BQD.shape[1], device=query_BQD.device).expand(query_BQD.shape[0], -1)

    def seen(self, query_BQD: Tensor, key_BSD: Tensor) -> Tensor | None:
        """Bool [B, 1 or H, Q, S]: whether a query sees a key, all of it together; None where all see all.

        A floating mask hides where it is -inf.
        """
        seen: Tensor | None = None
        if self.causal or self.document_BS is not None:
            place_BQ = self.places(query_BQD)
            if self.causal:
                place_S = torch.arange(key_BSD.shape[1], device=key_BSD.device)
                seen = (place_S <= place_BQ[:, :, None])[:, None]
            if self.document_BS is not None:
                own_BQ = self.document_BS.gather(1, place_BQ)
                same = (own_BQ[:, :, None] == self.document_BS[:, None, :])[:, None]
                seen = same if seen is None else seen & same
        if self.key_valid_BS is not None:
            valid = self.key_valid_BS[:, None, None, :]
            seen = valid if seen is None else seen & valid
        if self.mask_BHQS is not None:
            given = self.mask_BHQS if self.mask_BHQS.dtype == torch.bool else self.mask_BHQS != -torch.inf
            seen = given if seen is None else seen & given
        if seen is None:
            return None
        return seen.expand(query_BQD.shape[0], -1, query_BQD.shape[1], key_BSD.shape[1])

    def bias(self) -> Tensor | None:
        """[B or 1, H or 1, Q, S]: the floating mask, which is added to the scores; 0 where it hides. None without."""
        if self.mask_BHQS is None or self.mask_BHQS.dtype == torch.bool:
            return None
        return self.mask_BHQS.masked_fill(self.mask_BHQS == -torch.inf, 0)

    def of_rows(self, row_BR: Tensor, live_BR: Tensor, num_queries: int) -> Sight:
        """The same for some of the query rows.

        Args:
            row_BR: int64, which of the rows stand there; any where not ``live_BR``.
            live_BR: bool, false at rows that are there for the shape's sake only.
            num_queries: rows that there were (Q).
        """
        mask = self.mask_BHQS
        if mask is not None and mask.shape[2] > 1:
            mask = mask.expand(row_BR.shape[0], -1, -1, -1)
            index = row_BR[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.gather(2, index)
        place = row_BR if self.place_BQ is None else self.place_BQ.gather(1, row_BR)
        num_places = num_queries if self.place_BQ is None else self.num_places
        edges = self._edges_of(row_BR, live_BR, num_queries)
        return dataclasses.replace(self, place_BQ=place, num_places=num_places, mask_BHQS=mask, edges=edges)

    def _edges_of(self, row_BR: Tensor, live_BR: Tensor, num_queries: int) -> Tensor | SparseEdges | None:
        if self.edges is None:
            return None
        if isinstance(self.edges, Tensor):
            index = row_BR[:, :, None, None].expand(-1, -1, *self.edges.shape[2:])
            return self.edges.gather(1, index)
        place_R = torch.arange(row_BR.shape[1], device=row_BR.device).expand_as(row_BR)
        # One column more than there are rows, for what is not live; then it is cut off.
        new_BQ = row_BR.new_full((row_BR.shape[0], num_queries + 1), -1)
        new_BQ = new_BQ.scatter(1, torch.where(live_BR, row_BR, num_queries), place_R)[:, :num_queries]
        new_M = new_BQ[self.edges.sequence_M, self.edges.query_M]
        return dataclasses.replace(self.edges, query_M=torch.where(self.edges.query_M < 0, -1, new_M))


def masked_softmax(score_BHQS: Tensor, seen_BHQS: Tensor | None) -> Tensor:
    """Softmax over the keys that a query sees; zeros, with gradients of zero, for a query that sees nothing."""
    if seen_BHQS is None:
        return score_BHQS.softmax(3)
    any_BHQ1 = seen_BHQS.any(3, keepdim=True)
    # A query that sees nothing is first given all: a softmax of -inf alone is NaN, and so would its gradient be.
    weights_BHQS = score_BHQS.masked_fill(~seen_BHQS & any_BHQ1, -torch.inf).softmax(3)
    return weights_BHQS.masked_fill(~any_BHQ1, 0)


class Attended(NamedTuple):
    """What an expert returns.

    Attributes:
        out_BQD: heads side by side; zero for a query that sees nothing.
        weights_BHQS: what each query took from each key, after dropout; None where nobody asked.
    """

    out_BQD: Tensor
    weights_BHQS: Tensor | None


class AttentionExpert(nn.Module):
    """The base of every attention expert.

    Attributes:
        site: what it was built for.
    """

    site: ExpertSite

    @property
    def num_parameters(self) -> int:
        """Its parameters; buffers are none."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def output_dim(self) -> int:
        """Width of its output (D)."""
        return self.site.dim

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, *, need_weights: bool = False
    ) -> Attended:
        """[B, Q, D] queries, [B, S, D] keys and values -> [B, Q, D]; Q and S may differ.

        Every parameter takes part, whatever the sizes: one that had nothing to do gets a zero gradient and not None.

        Args:
            need_weights: whether to return the weights, which takes B H Q S numbers.

        Raises:
            ValueError: ``sight`` has what this kind cannot do (a mask), with the remedy. Edges are left aside by kinds
                that have no use for them: they are features, and hide nothing.
        """
        raise NotImplementedError

    def score_flops(self, length: int) -> float:
        """FLOPs per query row of a forward pass that no parameter accounts for, for documents of ``length`` positions;
        as `moedist.model.attention.contract.Attention.score_flops`."""
        raise NotImplementedError

    def init_weights(self, draw: Draw) -> None:
        """Fills every parameter and buffer in place; ``draw`` is named by the expert's global id, so that it starts
        equal wherever it lives."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ExpertSite:
    """What an attention expert is built for; experts of one mixture share it.

    Attributes:
        dim: width of queries, keys, values and output (D).
        num_heads: heads (H); each has D / H dims.
        dropout: share of the weights that is dropped in training.
        norm: the block's norm, for norms inside the expert.
        device, dtype: of its parameters; None for torch's own.
    """

    dim: int
    num_heads: int
    dropout: float = 0.0
    norm: NormConfig | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "is no head", "Set it to 1 or more.")
        require(
            self.dim % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            f"does not divide dim = {self.dim}",
            "Set it to a divisor of the width.",
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "is no share", "Set it in [0, 1).")

    @property
    def head_dim(self) -> int:
        """Dims of a head."""
        return self.dim // self.num_heads

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter without values."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))


@dataclasses.dataclass(frozen=True)
class AttentionExpertConfig(Choice, path="model.attention.experts"):
    """One kind of attention expert. What a kind can do besides (rotary positions, grouped heads, norms on queries and
    keys) are keys of its own; one that lacks the key cannot."""

    @property
    def keeps_masks(self) -> bool:
        """Whether it can keep `Sight.mask_BHQS`."""
        return True

    @property
    def edge_width(self) -> int | None:
        """Width of the edge features that it reads; None where it leaves them aside."""
        return None

    def check(self, site: ExpertSite) -> None:
        """Raises `ConfigError` where it does not fit ``site``."""

    def build(self, site: ExpertSite) -> AttentionExpert:
        """An expert without first values (`AttentionExpert.init_weights`).

        Raises:
            ConfigError: as `check`.
        """
        raise NotImplementedError
