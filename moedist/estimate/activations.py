"""Bytes that the parts of a block keep from forward to backward, and need for a moment, on one rank: closed forms.

Symbols as in the code of the parts: T positions, D model width, F hidden width, R rows at a rank's experts, E experts,
K experts per token. Every term names a tensor that autograd saves or that lives during one operation; the fake run
(`moedist.estimate.fake_run`) counts the same tensors on the real modules.
"""

from __future__ import annotations

import dataclasses

from moedist.config import ConfigError
from moedist.estimate.shape import BlockShape, Layout
from moedist.model.attention.contract import AttentionConfig
from moedist.model.attention.gqa import GQAConfig
from moedist.model.attention.mla import MLAConfig
from moedist.model.ffn.contract import FFNConfig
from moedist.model.ffn.dense import DenseConfig
from moedist.moe.ffn import FFNExpertsConfig
from moedist.moe.layer import MoEConfig


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one MoE layer and micro-step on the rank that has most of them.

    Attributes:
        sent: that leave for experts, those at home included.
        arrived: at the rank's experts.
    """

    sent: int
    arrived: int


@dataclasses.dataclass(frozen=True)
class Moment:
    """A moment of the forward or the backward pass of one half of a block.

    Attributes:
        temporary: bytes beside what is kept or was made again; below 0 where some of that is gone already.
        exchange: bytes in buffers of an all-to-all.
        gradients: share of the gradients of the half's weights that is there.
    """

    temporary: int = 0
    exchange: int = 0
    gradients: float = 0.0


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one half of a block.

    Attributes:
        outside: kept from forward to backward whatever is computed again: the norm, the router, the plan.
        input: of what may be computed again, all that is kept under ``full``.
        inside: kept in its place without checkpointing; made again in backward with it.
        products: kept beside the input under ``selective``.
        casts: narrow copies of weights that autocast makes, kept like what is ``inside``.
        forward, backward: the moments that may be the worst.
    """

    outside: int
    input: int
    inside: int
    products: int
    casts: int
    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]

    def saved(self, checkpointing: str) -> int:
        """Kept from forward to backward."""
        if checkpointing == "none":
            return self.outside + self.inside + self.casts
        return self.outside + self.input + (self.products if checkpointing == "selective" else 0)

    def again(self, checkpointing: str) -> int:
        """Made again in backward."""
        if checkpointing == "none":
            return 0
        return self.inside + self.casts - (self.products if checkpointing == "selective" else 0)


def norm_bytes(numbers: int, layout: Layout, size: int) -> int:
    """Saved by an RMS norm of ``numbers`` entries of ``size`` bytes: its input on CUDA, where the kernel is fused; on a
    CPU the input and the normalised one, both in fp32 or wider."""
    return numbers * size if layout.device == "cuda" else 2 * numbers * max(size, 4)


def input_bytes(numbers: int, layout: Layout, num_uses: int) -> int:
    """Saved by ``num_uses`` matrix products of one input: one copy, or under autocast one narrow copy each."""
    return numbers * layout.compute_size * (num_uses if layout.casts else 1)


def attention_held(config: AttentionConfig, dim: int, layout: Layout, weights: int) -> Held:
    """Of ``x + attention(norm(x))``; ``weights`` parameters."""
    if isinstance(config, GQAConfig):
        head_dim = config.head_dim or dim // config.num_heads
        query = layout.tokens * config.num_heads * head_dim
        key = layout.tokens * (config.num_kv_heads or config.num_heads) * head_dim
        inside = input_bytes(layout.tokens * dim, layout, 3) + _scores(query, key, key, query, config.num_heads, layout)
        if config.qk_norm is not None:
            inside += norm_bytes(query + key, layout, layout.compute_size)
        products = (2 * query + 2 * key) * layout.compute_size
        turned, written = query, 0
    elif isinstance(config, MLAConfig):
        query = layout.tokens * config.num_heads * (config.head_dim + config.rope_dim)
        value = layout.tokens * config.num_heads * config.value_dim
        up = layout.tokens * config.num_heads * (config.head_dim + config.value_dim)
        latent = layout.tokens * (config.kv_rank + (config.query_rank or 0))
        inside = input_bytes(layout.tokens * dim, layout, 2)
        inside += norm_bytes(latent, layout, layout.compute_size) + input_bytes(latent, layout, 1)
        # The value is a part of one product with the key, which stays whole for it.
        inside += _scores(query, query, up, value, config.num_heads, layout)
        products = (query + up + value + latent) * layout.compute_size
        turned, written = layout.tokens * config.num_heads * config.rope_dim, 0
        if layout.device == "cpu" and config.head_dim + config.rope_dim != config.value_dim:
            # The CPU has no fused kernel for values of another width: the scores are there, in fp32 or wider.
            scores = layout.tokens * layout.length * config.num_heads * max(layout.compute_size, 4)
            inside += scores + (2 * query + value) * max(layout.compute_size, 4)
            written = 2 * scores
    else:
        raise _unknown("model.attention.kind", config)
    positions = layout.tokens * dim
    wide = max(layout.compute_size, 4)
    return Held(
        outside=norm_bytes(positions, layout, layout.residual_size),
        input=positions * layout.residual_size,
        inside=inside,
        products=products + positions * layout.compute_size,
        casts=weights * layout.compute_size if layout.casts else 0,
        forward=(Moment(max(3 * turned * wide, written)),),
        backward=(
            Moment(written),
            Moment(3 * query * layout.compute_size + 3 * turned * wide, gradients=1.0),
        ),
    )


def _scores(query: int, key: int, value: int, out: int, num_heads: int, layout: Layout) -> int:
    """Saved by fused attention: its three inputs, its output, which the projection shares, and a log-sum per row."""
    return (query + key + value + out) * layout.compute_size + 4 * layout.tokens * num_heads


def ffn_held(block: BlockShape, dim: int, layout: Layout, rows: Rows | None) -> Held:
    """Of ``x + ffn(norm(x))``."""
    if block.moe is not None:
        assert rows is not None
        return moe_held(block.moe, dim, layout, rows)
    if not isinstance(block.ffn, DenseConfig):
        raise _unknown("model.ffn.kind", block.ffn)
    config, positions = block.ffn, layout.tokens * dim
    hidden = layout.tokens * (block.ffn_count.largest // dim)
    gated = config.activation == "swiglu"
    kept = input_bytes(positions, layout, 2 if gated else 1) + _hidden_tensors(config.activation) * hidden * (
        layout.compute_size
    )
    casts = block.ffn_count.other * layout.compute_size if layout.casts else 0
    # Nothing in a dense layer is computed again.
    return Held(
        outside=norm_bytes(positions, layout, layout.residual_size) + kept + casts,
        input=0,
        inside=0,
        products=0,
        casts=0,
        forward=(Moment(positions * layout.compute_size),),
        backward=(Moment(((2 if gated else 1) * hidden + 2 * positions) * layout.compute_size, gradients=1.0),),
    )


def _hidden_tensors(activation: str) -> int:
    """Tensors of hidden width that an expert keeps before its output's row weight: gate, up, silu(gate) and product; up
    and gelu(up); relu(up), from which the sign of up is known."""
    return {"swiglu": 4, "gelu": 2, "relu": 1}[activation]


def moe_held(moe: MoEConfig, dim: int, layout: Layout, rows: Rows) -> Held:
    """Of ``x + moe(norm(x))``: router and plan outside, the bank inside, the shared expert outside."""
    if not isinstance(moe.experts, FFNExpertsConfig):
        raise _unknown("moe.experts.kind", moe.experts)
    tokens, experts, size = layout.tokens, moe.num_experts, layout.compute_size
    wide, positions = max(size, 4), layout.tokens * dim
    pairs = tokens * moe.router.experts_per_token(experts)
    hidden_dim, activation = moe.experts.width(dim), moe.experts.activation
    num_local = experts // layout.ep

    scores = (1 + len(moe.balance)) * tokens * experts * wide
    indices = (4 if moe.capacity.dropless else 8) * 8 * pairs + 8 * rows.arrived
    outside = norm_bytes(positions, layout, layout.residual_size) + positions * wide + scores + indices
    if moe.shared_hidden_dim is not None:
        shared = moe.experts.expert_parameters(dim) // hidden_dim * moe.shared_hidden_dim
        outside += input_bytes(positions, layout, 2 if activation == "swiglu" else 1)
        outside += (_hidden_tensors(activation) + 1) * tokens * moe.shared_hidden_dim * size
        outside += shared * size if layout.casts else 0

    row, hidden = rows.arrived * dim * size, rows.arrived * hidden_dim * size
    inside = row + (_hidden_tensors(activation) + 1) * hidden + 4 * rows.arrived
    matrices = 3 if activation == "swiglu" else 2
    weight = num_local * dim * hidden_dim
    exchanged = layout.ep > 1
    sent = rows.sent * dim * size
    wide_hidden = rows.arrived * hidden_dim * wide
    cast_gradient = weight * (size + (wide if layout.casts else 0))
    most = max(row, sent)
    kept_hidden = _hidden_tensors(activation) * hidden
    backward = (
        # The gradient travels to the experts: what came in, and what is sorted out of it.
        Moment(0 if exchanged else row, 2 * most if exchanged else 0),
        Moment(row + hidden + cast_gradient, gradients=1 / matrices),
        Moment(2 * wide_hidden + (hidden if size < wide else 0), gradients=1 / matrices),
        Moment(2 * row + cast_gradient + (matrices - 1) * hidden - kept_hidden, gradients=1.0),
    )
    return Held(
        outside=outside,
        # The bank's input is the norm's output: the router's copy where it is as wide.
        input=positions * size if size < 4 and not layout.casts else 0,
        inside=inside,
        products=(matrices - 1) * hidden + row + ((row + sent) if exchanged else 0),
        casts=matrices * weight * size if size < layout.weight_size and layout.fsdp is None else 0,
        forward=(Moment(0 if exchanged else row, 3 * most if exchanged else 0), Moment(wide_hidden + hidden)),
        backward=backward,
    )


def _unknown(key: str, config: AttentionConfig | FFNConfig | object) -> ConfigError:
    return ConfigError(
        key,
        getattr(config, "kind", type(config).__name__),
        "has no closed form in estimate",
        "Choose the kind that is most like it; `moedist train --dry-run` counts the weights of any.",
    )
