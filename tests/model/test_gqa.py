"""Grouped-query attention against attention written out, and against its own parts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigError
from moedist.model.attention.contract import AttentionContext
from moedist.model.attention.gqa import GQA, GQAConfig
from moedist.model.init import init_weights
from moedist.model.norm.rmsnorm import RMSNormConfig
from moedist.model.rope import rope_table, rotate
from tests.model.rows import batch_of

DIM = 16


def build(config: GQAConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> GQA:
    attention = config.build(DIM, norm=RMSNormConfig(), output_scale=1.0, dtype=dtype)
    init_weights(attention, seed)
    for norm in (attention.query_norm, attention.key_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return attention


def plain(length: int, rows: int = 1) -> AttentionContext:
    return AttentionContext(torch.arange(length).expand(rows, length), None)


def written_out(attention: GQA, x_SD: Tensor) -> Tensor:
    """One document: loops over heads and positions, no torch attention."""
    length, width = x_SD.shape[0], attention.head_dim
    norms = {"query": attention.query_norm, "key": attention.key_norm, "value": None}

    def heads(name: str) -> Tensor:
        y = getattr(attention, name)(x_SD)
        norm = norms[name]
        if norm is not None and norm.weight.numel() == y.shape[1]:
            return norm(y).view(length, -1, width)
        y = y.view(length, -1, width)
        return y if norm is None else norm(y)

    table = rope_table(torch.arange(length).unsqueeze(0), width, attention.rope_theta)
    query, key = (rotate(heads(name).unsqueeze(0), table)[0] for name in ("query", "key"))
    value = heads("value")
    share = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for head in range(query.shape[1]):
        for place in range(length):
            score = key[: place + 1, head // share] @ query[place, head] / math.sqrt(width)
            out[place, head] = score.softmax(0) @ value[: place + 1, head // share]
    return attention.output(out.flatten(1))


@pytest.mark.parametrize("qk_norm", [None, "head", "projection"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("head_dim", [None, 6])
def test_equals_attention_written_out(qk_norm, num_kv_heads, head_dim):
    attention = build(GQAConfig(4, num_kv_heads, head_dim, qk_norm=qk_norm, bias=True))
    x_BSD = torch.randn(2, 7, DIM, dtype=torch.float64)
    got = attention(x_BSD, plain(7, rows=2))
    for row in range(2):
        torch.testing.assert_close(got[row], written_out(attention, x_BSD[row]), rtol=1e-12, atol=1e-12)


def test_equals_multi_head_attention_with_repeated_heads():
    grouped = build(GQAConfig(4, 2))
    full = build(GQAConfig(4), seed=1)
    with torch.no_grad():
        for name, module in grouped.named_children():
            getattr(full, name).weight.copy_(
                module.weight.view(2, -1, DIM).repeat_interleave(2, 0).flatten(0, 1)
                if name in ("key", "value")
                else module.weight
            )
    x_BSD = torch.randn(2, 5, DIM, dtype=torch.float64)
    torch.testing.assert_close(grouped(x_BSD, plain(5, 2)), full(x_BSD, plain(5, 2)), rtol=1e-12, atol=1e-12)


def test_norms_of_queries_and_keys_make_scores_blind_to_their_scale():
    attention = build(GQAConfig(4, qk_norm="head"))
    x_BSD = torch.randn(1, 5, DIM, dtype=torch.float64)
    before = attention(x_BSD, plain(5))
    with torch.no_grad():
        attention.query.weight.mul_(100)
        attention.key.weight.mul_(100)
    torch.testing.assert_close(attention(x_BSD, plain(5)), before, rtol=1e-4, atol=1e-4)
    assert build(GQAConfig(4, qk_norm="head")).query_norm.weight.shape == (DIM // 4,)
    assert build(GQAConfig(4, 2, qk_norm="projection")).key_norm.weight.shape == (DIM // 2,)
    assert build(GQAConfig(4, qk_norm=None)).query_norm is None


def test_the_future_changes_nothing():
    attention = build(GQAConfig(4, 2))
    x_BSD = torch.randn(1, 6, DIM, dtype=torch.float64)
    changed = x_BSD.clone()
    changed[:, 4:] += 1
    before, after = attention(x_BSD, plain(6)), attention(changed, plain(6))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_packed_documents_equal_the_documents_alone():
    attention = build(GQAConfig(4, 2))
    batch = batch_of([3, 4, 1], [5], length=8)
    packed = torch.randn(2, 8, DIM, dtype=torch.float64, requires_grad=True)
    weight_BSD = torch.randn(2, 8, DIM, dtype=torch.float64)
    out = attention(packed, AttentionContext.of_batch(batch))
    (out * weight_BSD * batch.valid_BS[..., None]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in attention.named_parameters()}
    attention.zero_grad()
    for row, start, size in [(0, 0, 3), (0, 3, 4), (0, 7, 1), (1, 0, 5)]:
        alone = packed[row : row + 1, start : start + size].detach().requires_grad_()
        want = attention(alone, plain(size))
        torch.testing.assert_close(out[row : row + 1, start : start + size], want, rtol=1e-12, atol=1e-12)
        (want * weight_BSD[row : row + 1, start : start + size]).sum().backward()
        torch.testing.assert_close(packed.grad[row : row + 1, start : start + size], alone.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in attention.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-11, atol=1e-11)


def test_padding_is_seen_by_none_and_gives_finite_gradients():
    attention = build(GQAConfig(4, 2))
    batch = batch_of([2, 3], length=8)
    # Padding in the midst of a document as well: a valid position must not see it.
    valid_BS = batch.valid_BS.clone()
    valid_BS[0, 3] = False
    context = AttentionContext.of_batch(dataclasses.replace(batch, valid_BS=valid_BS))
    x_BSD = torch.randn(1, 8, DIM, dtype=torch.float64, requires_grad=True)
    other = torch.where(valid_BS[..., None], x_BSD, torch.randn_like(x_BSD))
    out = attention(x_BSD, context)
    assert torch.equal(out[valid_BS], attention(other, context)[valid_BS])
    out.sum().backward()
    assert x_BSD.grad.isfinite().all() and out.isfinite().all()


def test_mask_shows_each_document_to_itself():
    mask_B1SS = AttentionContext.of_batch(batch_of([2, 1], length=4)).mask_B1SS
    assert mask_B1SS[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    one_document = dataclasses.replace(batch_of([4], length=4), document_BS=None)
    assert AttentionContext.of_batch(one_document).mask_B1SS is None


def test_gradients_are_those_of_the_function():
    attention = build(GQAConfig(2, 1))
    context = AttentionContext.of_batch(batch_of([2, 2], length=4))
    x_BSD = torch.randn(1, 4, DIM, dtype=torch.float64, requires_grad=True)
    names, values = zip(*attention.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x, context))

    assert torch.autograd.gradcheck(run, (x_BSD, *values), fast_mode=True)


def test_rope_table_is_made_once_per_forward_pass():
    context = plain(4)
    assert context.rope(4, 100.0) is context.rope(4, 100.0)
    assert context.rope(4, 100.0) is not context.rope(4, 200.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GQAConfig(4, 3), "num_kv_heads = 3 does not divide num_heads = 4. Set it to 1, 2 or 4, or to null"),
        (lambda: GQAConfig(4, 8), "num_kv_heads = 8 does not divide num_heads = 4"),
        (lambda: GQAConfig(0), "num_heads = 0 is too small. Set it to 1 or more"),
        (lambda: GQAConfig(4, head_dim=5), "head_dim = 5 is not an even number"),
        (lambda: GQAConfig(rope_theta=0.0), "rope_theta = 0.0 is not above 0"),
        (
            lambda: GQAConfig(5).check(16),
            "num_heads = 5 does not split dim = 16 .*Set it to 1, 2, 4 or 8, or set head_",
        ),
        (lambda: GQAConfig(4).check(12), "num_heads = 4 does not split dim = 12"),
        (lambda: build(GQAConfig(3)), "num_heads = 3 does not split dim = 16"),
    ],
)
def test_errors_say_key_value_and_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
