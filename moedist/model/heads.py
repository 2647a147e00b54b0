"""What attention experts share: projections split into heads, and what may happen to a head before it is compared."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import ConfigError, require
from moedist.model.attention.experts.contract import AttentionExpert, AttentionExpertConfig, ExpertSite, RowNames, Sight
from moedist.model.norm.rmsnorm import RMSNormConfig
from moedist.model.rope import rope_table, rotate
from moedist.moe.init import Draw, below, fill_xavier_uniform
from moedist.moe.noise import ATTENTION_DROP, uniform_by_name


@dataclasses.dataclass(frozen=True)
class HeadsConfig(AttentionExpertConfig):
    """Heads of an attention expert. A kind refuses, by key, what has no meaning in it.

    Attributes:
        num_kv_heads: key and value heads, each shared by ``num_heads / num_kv_heads`` query heads (Ainslie et al.
            2023); None for as many as query heads.
        rope_theta: base of the wavelengths of rotary positions (Su et al. 2021), which turn queries and keys by their
            place in the row; None for no positions.
        qk_norm: whether the block's norm is applied to each head of queries and keys, with weights shared by the heads.
    """

    num_kv_heads: int | None = None
    rope_theta: float | None = None
    qk_norm: bool = False

    def __post_init__(self) -> None:
        kv = self.num_kv_heads
        require(kv is None or kv >= 1, "num_kv_heads", kv, "is too small", "Set it to 1 or more, or to null.")
        theta = self.rope_theta
        require(theta is None or theta > 0, "rope_theta", theta, "is not above 0", "Set it to 10000 or so, or to null.")

    def check(self, site: ExpertSite) -> None:
        """Raises `ConfigError` where the heads of ``site`` cannot be shared or turned so."""
        require(
            self.num_kv_heads is None or site.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"does not divide num_heads = {site.num_heads}",
            "Set it to a divisor, or to null.",
        )
        require(
            self.rope_theta is None or site.head_dim % 2 == 0,
            "rope_theta",
            self.rope_theta,
            f"turns the dims of a head in pairs, and dim / num_heads = {site.head_dim} is odd",
            "Set it to null, or take heads of an even width.",
        )

    def refuse(self, key: str, reason: str) -> None:
        """Raises `ConfigError` where ``key``, which this kind cannot do for ``reason``, is set."""
        value = getattr(self, key)
        if value is not None and value is not False:
            raise ConfigError(key, value, f"cannot be had with {self.kind} attention: {reason}", "Leave it out.")


class Heads(NamedTuple):
    """Projected inputs, split into heads; keys and values repeated where query heads share them."""

    query_BHQh: Tensor
    key_BHSh: Tensor
    value_BHSh: Tensor


class ProjectedExpert(AttentionExpert):
    """The base of experts that project queries, keys and values, without biases, and split them into heads.

    Attributes:
        query, key, value: [D, D]; with fewer key and value heads the latter have D * num_kv_heads / num_heads rows.
        query_norm, key_norm: with ``qk_norm`` only.
    """

    def __init__(self, config: HeadsConfig, site: ExpertSite):
        super().__init__()
        config.check(site)
        self.heads, self.site = config, site
        kv_dim = (config.num_kv_heads or site.num_heads) * site.head_dim
        self.query = site.parameter(site.dim, site.dim)
        self.key = site.parameter(kv_dim, site.dim)
        self.value = site.parameter(kv_dim, site.dim)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm:
            norm = site.norm or RMSNormConfig()
            self.query_norm = norm.build(site.head_dim, device=site.device, dtype=site.dtype)
            self.key_norm = norm.build(site.head_dim, device=site.device, dtype=site.dtype)

    def init_weights(self, draw: Draw) -> None:
        """Xavier uniform matrices; norms as they say themselves."""
        for name in ("query", "key", "value"):
            if (matrix := getattr(self, name)) is not None:
                fill_xavier_uniform(matrix, draw(name))
        for name in ("query_norm", "key_norm"):
            if (norm := getattr(self, name)) is not None:
                norm.init_weights(below(draw, name))

    def value_weight(self) -> Tensor:
        """What projects values."""
        return self.value

    def project(self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, sight: Sight) -> Heads:
        """Queries, keys and values in heads, normed and turned where that is asked for."""
        query_BQHh = self._split(query_BQD, self.query, self.query_norm)
        key_BSHh = self._split(key_BSD, self.key, self.key_norm)
        if (theta := self.heads.rope_theta) is not None:
            place_S = torch.arange(key_BSD.shape[1], device=key_BSD.device).expand(key_BSD.shape[0], -1)
            query_BQHh = rotate(query_BQHh, rope_table(sight.places(query_BQD), self.site.head_dim, theta))
            key_BSHh = rotate(key_BSHh, rope_table(place_S, self.site.head_dim, theta))
        value_BSHh = self._split(value_BSD, self.value_weight(), None)
        shared = self.site.num_heads // value_BSHh.shape[2]
        if shared > 1:
            key_BSHh, value_BSHh = (x.repeat_interleave(shared, 2) for x in (key_BSHh, value_BSHh))
        return Heads(query_BQHh.transpose(1, 2), key_BSHh.transpose(1, 2), value_BSHh.transpose(1, 2))

    def drop(self, weights_BHQS: Tensor, names: RowNames | None, place_BQ: Tensor) -> Tensor:
        """In training, ``dropout`` of the weights set to zero and the others enlarged to make up for it.

        Drawn by name where the rows have names, so that recomputation and every layout drop the same ones; by torch's
        generator otherwise.
        """
        share = self.dropout
        if share == 0:
            return weights_BHQS
        if names is None:
            return F.dropout(weights_BHQS, share)
        _, num_heads, _, num_keys = weights_BHQS.shape
        head_H = torch.arange(num_heads, device=weights_BHQS.device)
        sample_B11, place_BQ1 = names.sample_B[:, None, None], place_BQ[:, :, None]
        name = (names.layer, ATTENTION_DROP, names.expert, sample_B11, place_BQ1, head_H)
        dropped_BQHS = uniform_by_name(names.seed, names.step, name, num_keys) < share
        return weights_BHQS.masked_fill(dropped_BQHS.transpose(1, 2), 0) / (1 - share)

    @property
    def dropout(self) -> float:
        """Share of the weights that is dropped now."""
        return self.site.dropout if self.training else 0.0

    def _split(self, x_BSD: Tensor, weight: Tensor, norm: nn.Module | None) -> Tensor:
        x_BSHh = F.linear(x_BSD, weight).unflatten(2, (-1, self.site.head_dim))
        return x_BSHh if norm is None else norm(x_BSHh)


def join_heads(x_BHQh: Tensor) -> Tensor:
    """[B, Q, D]: heads side by side."""
    return x_BHQh.transpose(1, 2).flatten(2)


def with_zero_gradients(out: Tensor, unused: list[Tensor]) -> Tensor:
    """``out``, which then depends on parameters that had nothing to do: they get zero gradients and not None."""
    if not unused:
        return out
    return out + torch.stack([parameter.new_zeros(()) * parameter.sum() for parameter in unused]).sum().to(out.dtype)
