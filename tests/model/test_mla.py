"""Multi-head latent attention against attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigError
from moedist.model.attention.contract import AttentionContext
from moedist.model.attention.mla import MLA, MLAConfig
from moedist.model.init import init_weights
from moedist.model.norm.rmsnorm import RMSNormConfig
from moedist.model.rope import rope_table, rotate
from tests.model.rows import batch_of

DIM = 16
SMALL = {"num_heads": 3, "kv_rank": 5, "head_dim": 6, "rope_dim": 4, "value_dim": 7}


def build(query_rank: int | None) -> MLA:
    config = MLAConfig(query_rank=query_rank, **SMALL)
    attention = config.build(DIM, norm=RMSNormConfig(), output_scale=1.0, dtype=torch.float64)
    init_weights(attention, 0)
    for norm in (attention.query_norm, attention.kv_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return attention


def plain(length: int, rows: int = 1) -> AttentionContext:
    return AttentionContext(torch.arange(length).expand(rows, length), None)


def written_out(attention: MLA, x_SD: Tensor) -> Tensor:
    """One document, head by head and position by position, after DeepSeek-V2's equations 9 to 19."""
    config, length = attention.config, x_SD.shape[0]
    table = rope_table(torch.arange(length)[None], config.rope_dim, config.rope_theta)

    def turned(y_Sh: Tensor) -> Tensor:
        return rotate(y_Sh[None, :, None], table)[0, :, 0]

    latent = x_SD if attention.query_down is None else attention.query_norm(attention.query_down(x_SD))
    query = attention.query(latent).view(length, config.num_heads, -1)
    down = attention.kv_down(x_SD)
    kv = attention.kv_up(attention.kv_norm(down[:, : config.kv_rank])).view(length, config.num_heads, -1)
    shared = turned(down[:, config.kv_rank :])
    heads = []
    for head in range(config.num_heads):
        q = torch.cat([query[:, head, : config.head_dim], turned(query[:, head, config.head_dim :])], dim=1)
        k = torch.cat([kv[:, head, : config.head_dim], shared], dim=1)
        v = kv[:, head, config.head_dim :]
        out = []
        for place in range(length):
            score = k[: place + 1] @ q[place] / math.sqrt(config.head_dim + config.rope_dim)
            out.append(score.softmax(0) @ v[: place + 1])
        heads.append(torch.stack(out))
    return attention.output(torch.cat(heads, dim=1))


@pytest.mark.parametrize("query_rank", [None, 8])
def test_equals_attention_written_out(query_rank):
    attention = build(query_rank)
    x_BSD = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    got_BSD = attention(x_BSD, plain(7, rows=2))
    wanted_BSD = torch.stack([written_out(attention, x_SD) for x_SD in x_BSD])
    torch.testing.assert_close(got_BSD, wanted_BSD, rtol=1e-12, atol=1e-12)
    weight_BSD = torch.randn_like(got_BSD)
    leaves = {"x": x_BSD, **dict(attention.named_parameters())}
    got, wanted = (torch.autograd.grad((y * weight_BSD).sum(), list(leaves.values())) for y in (got_BSD, wanted_BSD))
    for name, got_gradient, wanted_gradient in zip(leaves, got, wanted, strict=True):
        assert wanted_gradient.abs().max() > 0, name
        torch.testing.assert_close(got_gradient, wanted_gradient, rtol=1e-11, atol=1e-12, msg=name)


def test_documents_of_a_row_do_not_see_each_other():
    attention = build(8)
    batch = batch_of([3, 4], length=8)
    x_BSD = torch.randn(1, 8, DIM, dtype=torch.float64)
    out = attention(x_BSD, AttentionContext.of_batch(batch))
    for start, size in [(0, 3), (3, 4)]:
        alone = attention(x_BSD[:, start : start + size], plain(size))
        torch.testing.assert_close(out[:, start : start + size], alone, rtol=1e-12, atol=1e-12)


def test_an_odd_width_cannot_be_turned():
    with pytest.raises(ConfigError, match="rope_dim = 3 is not an even number"):
        MLAConfig(rope_dim=3)
