"""Standard attention against torch's own module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moedist.model.attention.experts.contract import Sight
from moedist.model.attention.experts.standard import StandardConfig, fused_attention
from moedist.model.heads import Heads
from tests.model.attention.experts.made import B, D, H, S, build, golden, random_mask, rows


@pytest.mark.parametrize("causal", [False, True])
def test_R2_43_equals_multi_head_attention_with_every_gradient(causal: bool):
    expert = build(StandardConfig())
    twin = nn.MultiheadAttention(D, H, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([expert.query, expert.key, expert.value]))
        twin.out_proj.weight.copy_(torch.eye(D))
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1) if causal else None
    inputs = [rows(B, S, D, seed=n).requires_grad_() for n in range(3)]
    expected, expected_weights = twin(*inputs, attn_mask=hidden, average_attn_weights=False)
    got = expert(*inputs, Sight(causal=causal))
    shown = expert(*inputs, Sight(causal=causal), need_weights=True)
    torch.testing.assert_close(got.out_BQD, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(shown.weights_BHQS, expected_weights, rtol=0, atol=1e-14)
    weight = rows(B, S, D, seed=5)
    expected_grads = torch.autograd.grad((expected * weight).sum(), [*inputs, twin.in_proj_weight])
    for out in (got.out_BQD, shown.out_BQD):
        grads = torch.autograd.grad((out * weight).sum(), [*inputs, expert.query, expert.key, expert.value])
        for one, other in zip([*grads[:3], torch.cat(grads[3:])], expected_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_golden_softmax():
    numbers = golden()
    heads = Heads(*(torch.tensor(numbers[key], dtype=torch.float64)[None, None] for key in "qkv"))
    out = fused_attention(heads, Sight(), heads.query_BHQh[0], heads.key_BHSh[0])[0, 0]
    torch.testing.assert_close(out, torch.tensor(numbers["softmax"]["out"], dtype=torch.float64), rtol=0, atol=1e-9)


def test_cross_attention_of_another_length_and_a_mask():
    expert = build(StandardConfig())
    query, key = rows(B, 4, D), rows(B, S, D, seed=1)
    mask = random_mask()[:, :, :4]
    out = expert(query, key, key, Sight(mask_BHQS=mask)).out_BQD
    shown = expert(query, key, key, Sight(mask_BHQS=mask), need_weights=True).out_BQD
    torch.testing.assert_close(out, shown, rtol=0, atol=1e-14)
    assert not out[0, 1].any()


def test_score_flops_are_those_of_the_two_products():
    """Half of them is what causality leaves."""
    from torch.utils.flop_counter import FlopCounterMode

    expert = build(StandardConfig())
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    with FlopCounterMode(display=False) as counter:
        expert(*inputs, Sight(), need_weights=True)
    assert counter.get_total_flops() == B * S * (2 * expert.num_parameters + 2 * expert.score_flops(S))
