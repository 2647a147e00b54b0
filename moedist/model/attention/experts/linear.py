"""Attention whose cost grows with the length, not its square: weights are products of features of query and key
(Katharopoulos et al. 2020, "Transformers are RNNs"; FAVOR+, Choromanski et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moedist.config import require
from moedist.model.attention.experts.contract import Attended, ExpertSite, Sight
from moedist.model.heads import HeadsConfig, ProjectedExpert, join_heads
from moedist.model.random_features import log_positive_features, normal_numbers, orthogonal_directions
from moedist.moe.init import Draw, fill_whole
from moedist.moe.noise import FEATURES, uniform_by_name
from moedist.moe.router.contract import wide


@dataclasses.dataclass(frozen=True)
class LinearConfig(HeadsConfig):
    """Linear attention.

    Attributes:
        features: ``elu``: ``elu(x) + 1``; ``favor``: positive random features, whose weights estimate those of softmax.
        num_features: of ``favor``: more are closer to softmax, and cost more.
        redraw_every: of ``favor``: steps after which the random directions are drawn anew, by the name of the step and
            the expert; None for never.
        chunk: positions that are computed at once where attention is causal.
    """

    features: Literal["elu", "favor"] = "elu"
    num_features: int = 256
    redraw_every: int | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_features", "chunk", "redraw_every"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "is too small", "Set it to 1 or more.")
        if self.features == "elu":
            self.refuse(
                "rope_theta", "elu(x) + 1 does not turn with x, so that weights would not be of relative places"
            )
            self.refuse("redraw_every", "elu(x) + 1 has nothing random")

    @property
    def keeps_masks(self) -> bool:
        """No: it has no weights of single pairs."""
        return False

    def build(self, site: ExpertSite) -> LinearExpert:  # noqa: D102
        return LinearExpert(self, site)


class LinearExpert(ProjectedExpert):
    """``phi(q)^T S / (phi(q)^T z)`` with ``S = sum_j phi(k_j) v_j^T`` and ``z = sum_j phi(k_j)``.

    Features, sums and quotients are fp32 or wider, also under autocast. Dropout leaves out a key for all queries of a
    head at once, because there are no weights of single pairs to leave out.

    Attributes:
        directions_mh: with ``favor`` only, a buffer: the random directions, shared by the heads; with ``redraw_every``
            those of rows that have no names.
    """

    directions_mh: Tensor | None

    def __init__(self, config: LinearConfig, site: ExpertSite):
        super().__init__(config, site)
        self.config = config
        directions = None
        if config.features == "favor":
            directions = torch.empty(config.num_features, site.head_dim, device=site.device, dtype=site.dtype)
        self.register_buffer("directions_mh", directions)

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform matrices, and the directions."""
        super().init_weights(draw)
        if self.directions_mh is not None:
            num, dim = self.directions_mh.shape
            drawn = torch.randn(normal_numbers(num, dim), generator=draw("directions"), dtype=torch.float64)
            fill_whole(self.directions_mh, orthogonal_directions(drawn, num))

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight, *, need_weights: bool = False
    ) -> Attended:
        """See the contract; edges are left aside.

        Where attention is causal, query rows at one place must be the same row, and a document must lie in one piece.
        Weights take B H Q S numbers, and so do documents of attention that is not causal.

        Raises:
            ValueError: ``sight`` has a mask.
        """
        _refuse_mask(sight)
        heads = self.project(query_BQD, key_BSD, value_BSD, sight)
        with torch.autocast(query_BQD.device.type, enabled=False):
            query = self._features(wide(heads.query_BHQh), sight)
            key = self._features(wide(heads.key_BHSh), sight)
            value_BHSh = wide(heads.value_BHSh)
            kept_BHS1 = self._kept_keys(value_BHSh, sight)
            value_BHSv = _with_ones(value_BHSh if kept_BHS1 is None else value_BHSh * kept_BHS1)
            weights_BHQS = None
            if not need_weights and sight.causal and query_BQD.shape[1] > self.config.chunk:
                out_BHQv = _by_chunks(query, key, value_BHSv, sight, self.config.chunk)
            elif not need_weights and not sight.causal and sight.document_BS is None:
                out_BHQv = _by_sums(query, key, value_BHSv, sight.key_valid_BS)
            else:
                product_BHQS, _ = _by_pairs(query, key, sight.seen(query_BQD, key_BSD))
                out_BHQv = product_BHQS @ value_BHSv
                weights_BHQS = product_BHQS / _divisor(out_BHQv)
                if kept_BHS1 is not None:
                    weights_BHQS = weights_BHQS * kept_BHS1.transpose(2, 3)
            out_BHQh = out_BHQv[..., :-1] / _divisor(out_BHQv)
        out_BQD = join_heads(out_BHQh).to(heads.value_BHSh.dtype)
        return Attended(out_BQD, weights_BHQS if need_weights else None)

    def score_flops(self, length: int) -> float:
        """For every head the products with the random directions, and of features in pairs within a chunk (of which
        half is visible); with more than a chunk the sums of the keys as well, made once and read once."""
        width, chunk = self.site.head_dim, self.config.chunk
        favor = self.config.features == "favor"
        num_features = self.config.num_features if favor else width
        per_head = 2.0 * 2 * width * num_features if favor else 0.0
        per_head += 2 * (num_features + width + 1) * min(length, chunk) / 2
        per_head += 2 * 2 * num_features * (width + 1) if length > chunk else 0
        return self.site.num_heads * per_head

    def _features(self, x_BHSh: Tensor, sight: Sight) -> Features:
        if self.directions_mh is None:
            return Features(F.elu(x_BHSh) + 1, x_BHSh.new_zeros(x_BHSh.shape[:-1]))
        log_BHSm = log_positive_features(x_BHSh, wide(self._directions(sight)).to(x_BHSh.dtype))
        top_BHS = log_BHSm.detach().amax(3)
        return Features((log_BHSm - top_BHS[..., None]).exp(), top_BHS)

    @torch.no_grad()
    def _directions(self, sight: Sight) -> Tensor:
        """Those of the buffer, or those of the rows' step."""
        assert self.directions_mh is not None
        names, every = sight.names, self.config.redraw_every
        if names is None or every is None:
            return self.directions_mh
        num, dim = self.directions_mh.shape
        rows, columns = normal_numbers(num, dim)
        name = (names.layer, FEATURES, names.expert, torch.arange(rows, device=self.directions_mh.device))
        uniform = uniform_by_name(names.seed, names.step // every, name, columns)
        return orthogonal_directions(math.sqrt(2) * torch.erfinv(2 * uniform - 1), num)

    def _kept_keys(self, value_BHSh: Tensor, sight: Sight) -> Tensor | None:
        """[B, H, S, 1]: factors on the keys, 0 where one is dropped; None where none is."""
        if self.dropout == 0:
            return None
        ones_BH1S = value_BHSh.new_ones(value_BHSh.shape[:3])[:, :, None]
        place_B1 = torch.zeros(value_BHSh.shape[0], 1, dtype=torch.int64, device=value_BHSh.device)
        return self.drop(ones_BH1S, sight.names, place_B1).transpose(2, 3)


class Features(NamedTuple):
    """Features of queries or keys: ``phi_BHSm exp(log_scale_BHS)``. The scale has no gradient: a query's cancels in the
    quotient, and a key's counts beside those of the other keys that the query sees, the largest of which cancels."""

    phi_BHSm: Tensor
    log_scale_BHS: Tensor


_LOWEST = -1e30
"""The largest log-scale where there is none: low, and finite, so that differences are no NaN."""


def _by_pairs(query: Features, key: Features, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products of features [..., Q, S], 0 where not seen, and by row the log-scale [..., Q, 1] that was left out."""
    scale_1S = key.log_scale_BHS[..., None, :]
    scale_QS = scale_1S if seen is None else torch.where(seen, scale_1S, -torch.inf)
    top_Q1 = F.pad(scale_QS, (0, 1), value=_LOWEST).amax(-1, keepdim=True)
    return query.phi_BHSm @ key.phi_BHSm.transpose(-1, -2) * (scale_QS - top_Q1).exp(), top_Q1


def _by_sums(query: Features, key: Features, value_BHSv: Tensor, valid_BS: Tensor | None) -> Tensor:
    """[B, H, Q, v] where every query sees all valid keys."""
    scale_BHS = key.log_scale_BHS
    if valid_BS is not None:
        scale_BHS = scale_BHS.masked_fill(~valid_BS[:, None], -torch.inf)
    return query.phi_BHSm @ _summed(key.phi_BHSm, scale_BHS, value_BHSv)[0]


def _by_chunks(query: Features, key: Features, value_BHSv: Tensor, sight: Sight, chunk: int) -> Tensor:
    """[B, H, Q, v] of causal attention: in pairs within a chunk, and from the sums of the chunks before it.

    The sums that are carried from chunk to chunk are those of one document, that of the chunk's last key: no later
    query belongs to an earlier one. Each query's products are scaled by the largest key that it sees, so that not even
    an underflow depends on what it does not see.
    """
    num_rows, num_keys = query.phi_BHSm.shape[2], key.phi_BHSm.shape[2]
    phi_BHQm = query.phi_BHSm
    if sight.place_BQ is not None:
        phi_BHQm = _at_places(phi_BHQm, sight.place_BQ, sight.num_places or num_keys)
    length = -(-max(phi_BHQm.shape[2], num_keys) // chunk) * chunk

    def cut(x: Tensor, dim: int, fill: float = 0) -> Tensor:
        missing = x.new_full((*x.shape[:dim], length - x.shape[dim], *x.shape[dim + 1 :]), fill)
        return torch.cat([x, missing], dim).unflatten(dim, (-1, chunk))

    scale_BHS = key.log_scale_BHS
    if sight.key_valid_BS is not None:
        scale_BHS = scale_BHS.masked_fill(~sight.key_valid_BS[:, None], -torch.inf)
    document_BS = sight.document_BS
    if document_BS is None:
        document_BS = scale_BHS.new_zeros(scale_BHS.shape[0], num_keys, dtype=torch.int64)
    query_BHNCm, key_BHNCm, value_BHNCv = cut(phi_BHQm, 2), cut(key.phi_BHSm, 2), cut(value_BHSv, 2)
    scale_BHNC, document_B1NC = cut(scale_BHS, 2, -torch.inf), cut(document_BS, 1)[:, None]

    seen = (document_B1NC[..., :, None] == document_B1NC[..., None, :]).tril()
    keys = Features(key_BHNCm, scale_BHNC)
    product_BHNCC, top_BHNC1 = _by_pairs(Features(query_BHNCm, scale_BHNC), keys, seen)
    sums_BHNmv, sums_top_BHN11 = _carried_sums(keys, value_BHNCv, document_B1NC)
    last_B1N = document_B1NC[..., -1]
    before_B1N = torch.cat([last_B1N[..., :1], last_B1N[..., :-1]], 2)
    goes_on = document_B1NC[..., None] == before_B1N[..., None, None]
    whole_top_BHNC1 = torch.maximum(top_BHNC1, torch.where(goes_on, sums_top_BHN11, _LOWEST))
    from_before = (sums_top_BHN11 - whole_top_BHNC1).masked_fill(~goes_on, -torch.inf).exp()
    out_BHNCv = (product_BHNCC * (top_BHNC1 - whole_top_BHNC1).exp()) @ value_BHNCv
    out_BHSv = (out_BHNCv + query_BHNCm @ sums_BHNmv * from_before).flatten(2, 3)
    if sight.place_BQ is None:
        return out_BHSv[:, :, :num_rows]
    return out_BHSv.gather(2, sight.place_BQ[:, None, :, None].expand(-1, out_BHSv.shape[1], -1, out_BHSv.shape[3]))


def _carried_sums(key: Features, value_BHNCv: Tensor, document_B1NC: Tensor) -> tuple[Tensor, Tensor]:
    """Before each chunk: the sums of the document that the chunk before it ended in, and the log-scale left out."""
    phi_BHNCm, scale_BHNC = key
    last_B1N = document_B1NC[..., -1]
    sums_BHmv = phi_BHNCm.new_zeros(*phi_BHNCm.shape[:2], phi_BHNCm.shape[-1], value_BHNCv.shape[-1])
    top_BH11 = scale_BHNC.new_full((*scale_BHNC.shape[:2], 1, 1), _LOWEST)
    sums, tops = [], []
    for n in range(phi_BHNCm.shape[2]):
        sums.append(sums_BHmv)
        tops.append(top_BH11)
        ended_B1C = document_B1NC[:, :, n] != last_B1N[:, :, n, None]
        gone_B111 = (last_B1N[:, :, n] != last_B1N[:, :, max(0, n - 1)])[..., None, None]
        scale_BHC = scale_BHNC[:, :, n].masked_fill(ended_B1C, -torch.inf)
        more_BHmv, more_top_BH11 = _summed(phi_BHNCm[:, :, n], scale_BHC, value_BHNCv[:, :, n])
        new_top_BH11 = torch.maximum(top_BH11.masked_fill(gone_B111, _LOWEST), more_top_BH11)
        decay = (top_BH11 - new_top_BH11).masked_fill(gone_B111, -torch.inf).exp()
        sums_BHmv = sums_BHmv * decay + more_BHmv * (more_top_BH11 - new_top_BH11).exp()
        top_BH11 = new_top_BH11
    return torch.stack(sums, 2), torch.stack(tops, 2)


def _summed(phi_BHSm: Tensor, scale_BHS: Tensor, value_BHSv: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_j phi_j v_j^T`` [B, H, m, v], and the log-scale [B, H, 1, 1] that was left out of it; a key whose scale is
    -inf is left out."""
    top_BH1 = F.pad(scale_BHS, (0, 1), value=_LOWEST).amax(2, keepdim=True)
    weight_BHS1 = (scale_BHS - top_BH1).exp()[..., None]
    return phi_BHSm.transpose(2, 3) @ (value_BHSv * weight_BHS1), top_BH1[..., None]


def _at_places(phi_BHQm: Tensor, place_BQ: Tensor, num_places: int) -> Tensor:
    """[B, H, S, m]: each row at its place, zero where there is none; of rows at one place, which are the same, one."""
    (num_sequences, num_rows), device = place_BQ.shape, place_BQ.device
    row_BS = torch.full((num_sequences, num_places), num_rows, device=device)
    row_BS = row_BS.scatter(1, place_BQ, torch.arange(num_rows, device=device).expand(num_sequences, -1))
    padded_BHQm = F.pad(phi_BHQm, (0, 0, 0, 1))
    return padded_BHQm.gather(2, row_BS[:, None, :, None].expand(-1, phi_BHQm.shape[1], -1, phi_BHQm.shape[3]))


def _with_ones(value_BHSh: Tensor) -> Tensor:
    """[..., h + 1]: what sums to the numerator, and ones, which sum to the divisor."""
    return torch.cat([value_BHSh, torch.ones_like(value_BHSh[..., :1])], -1)


def _divisor(out_BHQv: Tensor) -> Tensor:
    """The last column, but 1 where it is zero: there the query sees nothing, and its numerator is zero as well."""
    divisor_BHQ1 = out_BHQv[..., -1:]
    return torch.where(divisor_BHQ1 > 0, divisor_BHQ1, 1)


def _refuse_mask(sight: Sight) -> None:
    if sight.mask_BHQS is not None:
        raise ValueError(
            f"linear attention has no weights of single pairs, so a mask of shape {list(sight.mask_BHQS.shape)} cannot "
            "be kept. Say causal, key_valid_BS or document_BS instead, or take another kind of expert."
        )
