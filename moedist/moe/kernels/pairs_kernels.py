"""What happens to pairs around the experts, in Triton: tokens choose, pairs find their places, rows are copied and
summed.

Every output element is written by one program and sums run in one order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moedist.moe.kernels.launch import on


@triton.jit
def sum_rows_kernel(x, index, out, num_terms, width, BLOCK: tl.constexpr):
    """``out[m] = sum_k x[index[m, k]]``, an index below 0 standing for zeros."""
    blocks = tl.cdiv(width, BLOCK)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK,), dtype=wide)
    for k in range(0, num_terms):
        row = tl.load(index + m * num_terms + k).to(tl.int64)
        total += tl.load(x + row * width + d, mask=(row >= 0) & (d < width), other=0).to(wide)
    tl.store(out + m * width + d, total.to(out.dtype.element_ty), mask=d < width)


@triton.jit
def choose_kernel(
    logits, score, expert, gate, num_tokens, num_experts, eps,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Scores of all experts, the K experts of the highest logits (equal ones: the lowest index), and their gates."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    k = tl.arange(0, CHOICES)
    is_there = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    place = t[:, None] * num_experts + e[None, :]
    logits_TE = tl.load(logits + place, mask=is_there, other=-float("inf"))
    if SCORE == "softmax":
        largest = tl.max(logits_TE, 1)
        power = tl.exp(logits_TE - tl.where(t < num_tokens, largest, 0)[:, None])
        total = tl.sum(power, 1)
        score_TE = power / tl.where(t < num_tokens, total, 1)[:, None]
    else:
        score_TE = tl.where(is_there, tl.sigmoid(logits_TE), 0)
    tl.store(score + place, score_TE, mask=is_there)
    # As in a sort, what is no number comes first: every token gets K experts, whatever its logits are.
    order_TE = tl.where(logits_TE == logits_TE, logits_TE, float("inf"))
    is_open = (e < num_experts)[None, :] & (t >= 0)[:, None]
    expert_TK = tl.zeros((TOKENS, CHOICES), dtype=tl.int32)
    score_TK = tl.zeros((TOKENS, CHOICES), dtype=score_TE.dtype)
    for choice in tl.static_range(K):
        best = tl.max(tl.where(is_open, order_TE, -float("inf")), 1)
        wins = is_open & (order_TE == best[:, None])
        chosen = tl.min(tl.where(wins, e[None, :], EXPERTS), 1)
        is_chosen = e[None, :] == chosen[:, None]
        is_open = is_open & (e[None, :] != chosen[:, None])
        expert_TK = tl.where((k == choice)[None, :], chosen[:, None], expert_TK)
        own = tl.sum(tl.where(is_chosen, score_TE, 0), 1)
        score_TK = tl.where((k == choice)[None, :], own[:, None], score_TK)
    if RENORMALIZE:
        score_TK = score_TK / tl.maximum(tl.sum(score_TK, 1), eps)[:, None]
    place = t[:, None] * K + k[None, :]
    is_choice = (t < num_tokens)[:, None] & (k < K)[None, :]
    tl.store(expert + place, expert_TK.to(tl.int64), mask=is_choice)
    tl.store(gate + place, score_TK, mask=is_choice)


@triton.jit
def choose_gradient_kernel(
    score, expert, grad_score, grad_gate, grad_logits, num_tokens, num_experts, eps,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """The logits' gradient from those of scores and gates."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    is_there = (t < num_tokens)[:, None] & (e < num_experts)[None, :]
    place = t[:, None] * num_experts + e[None, :]
    score_TE = tl.load(score + place, mask=is_there, other=0)
    grad_TE = tl.load(grad_score + place, mask=is_there, other=0)
    total = tl.zeros((TOKENS,), dtype=score_TE.dtype)
    dot = tl.zeros((TOKENS,), dtype=score_TE.dtype)
    if RENORMALIZE:
        for choice in tl.static_range(K):
            chosen = tl.load(expert + t * K + choice, mask=t < num_tokens, other=0)
            own = tl.sum(tl.where(e[None, :] == chosen[:, None], score_TE, 0), 1)
            total += own
            dot += own * tl.load(grad_gate + t * K + choice, mask=t < num_tokens, other=0)
    for choice in tl.static_range(K):
        chosen = tl.load(expert + t * K + choice, mask=t < num_tokens, other=0)
        grad = tl.load(grad_gate + t * K + choice, mask=t < num_tokens, other=0)
        if RENORMALIZE:
            # Of s_k / max(sum s, eps): where the sum is below eps, the divisor is a constant.
            shared = tl.where(total >= eps, dot / tl.maximum(total, eps), 0)
            grad = (grad - shared) / tl.maximum(total, eps)
        grad_TE += tl.where(e[None, :] == chosen[:, None], grad[:, None], 0)
    if SCORE == "softmax":
        grad_TE = score_TE * (grad_TE - tl.sum(score_TE * grad_TE, 1)[:, None])
    else:
        grad_TE = grad_TE * score_TE * (1 - score_TE)
    tl.store(grad_logits + place, grad_TE.to(score_TE.dtype), mask=is_there)


@triton.jit
def count_kernel(
    bucket, order, sizes, num_pairs, num_buckets,
    ORDERED: tl.constexpr, PAIRS: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """How many of each block of pairs are of each bucket."""
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    pair = tl.load(order + i, mask=i < num_pairs, other=0) if ORDERED else i
    own = tl.load(bucket + pair, mask=i < num_pairs, other=-1)
    b = tl.arange(0, BUCKETS)
    size = tl.sum((own[:, None] == b[None, :]).to(tl.int32), 0)
    tl.store(sizes + tl.program_id(0).to(tl.int64) * num_buckets + b, size, mask=b < num_buckets)


@triton.jit
def place_kernel(bucket, order, first, place, num_pairs, num_buckets, ORDERED: tl.constexpr, PAIRS: tl.constexpr):
    """Each pair's place: those of its bucket in the blocks before, and before it in its own."""
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    pair = tl.load(order + i, mask=i < num_pairs, other=0) if ORDERED else i
    own = tl.load(bucket + pair, mask=i < num_pairs, other=0)
    j = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    other = tl.load(order + j, mask=j < num_pairs, other=0) if ORDERED else j
    of_other = tl.load(bucket + other, mask=j < num_pairs, other=-1)
    before = tl.sum(((own[:, None] == of_other[None, :]) & (j[None, :] < i[:, None])).to(tl.int64), 1)
    base = tl.load(first + tl.program_id(0).to(tl.int64) * num_buckets + own, mask=i < num_pairs, other=0)
    tl.store(place + pair, base.to(tl.int64) + before, mask=i < num_pairs)


def probe(device: torch.device) -> bool:
    """Whether small cases come out as they must on a device: ties, rows that are not there, buckets by turns."""
    x = torch.arange(40, device=device, dtype=torch.float32).view(5, 8)
    summed = sum_rows(x, torch.tensor([[4, -1], [0, 2], [-1, -1]], device=device))
    bucket_N = torch.tensor([2, 0, 2, 1, 0, 2], device=device)
    placed = places(bucket_N, 3, None), places(bucket_N, 3, torch.arange(5, -1, -1, device=device))
    logits_TE = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]], device=device, requires_grad=True)
    weight_TE = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]], device=device)
    probs_TE = logits_TE.softmax(1)
    first_two = torch.tensor([[1, 2], [0, 1]], device=device)
    (probs_TE * weight_TE).sum().backward()
    score_TE, expert_TK, gate_TK = choose(logits_TE.detach(), 2, "softmax", False, 0.0)
    grad_TE = choose_gradient(score_TE, expert_TK, weight_TE, torch.zeros_like(gate_TK), "softmax", False, 0.0)
    assert logits_TE.grad is not None
    return (
        torch.equal(summed, torch.stack([x[4], x[0] + x[2], torch.zeros_like(x[0])]))
        and [place_N.tolist() for place_N in placed] == [[0, 0, 1, 0, 1, 2], [2, 1, 1, 0, 0, 0]]
        and torch.equal(expert_TK, first_two)
        and torch.allclose(gate_TK, probs_TE.gather(1, first_two))
        and torch.allclose(grad_TE, logits_TE.grad, atol=1e-6)
    )


def sum_rows(x: Tensor, index_MK: Tensor) -> Tensor:
    """See `moedist.moe.kernels.pairs.sum_rows`."""
    out, width = x.new_empty(index_MK.shape[0], x.shape[1]), x.shape[1]
    if out.numel() == 0:
        return out
    block = min(triton.next_power_of_2(width), 1024)
    with on(x):
        sum_rows_kernel[(out.shape[0] * triton.cdiv(width, block),)](
            x.contiguous(), index_MK.contiguous(), out, index_MK.shape[1], width, BLOCK=block
        )
    return out


def blocks_of_tokens(num_experts: int, top_k: int) -> dict[str, int]:
    """Tokens, experts and choices of a program."""
    experts = triton.next_power_of_2(num_experts)
    return {
        "TOKENS": max(1, min(32, 2048 // experts)),
        "EXPERTS": experts,
        "CHOICES": triton.next_power_of_2(top_k),
    }


def choose(logits_TE: Tensor, top_k: int, score: str, renormalize: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `moedist.moe.kernels.pairs.choose`."""
    (num_tokens, num_experts), blocks = logits_TE.shape, blocks_of_tokens(logits_TE.shape[1], top_k)
    score_TE = torch.empty_like(logits_TE)
    expert_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    gate_TK = logits_TE.new_empty(num_tokens, top_k)
    if num_tokens:
        with on(logits_TE):
            choose_kernel[(triton.cdiv(num_tokens, blocks["TOKENS"]),)](
                logits_TE, score_TE, expert_TK, gate_TK, num_tokens, num_experts, eps,
                K=top_k, SCORE=score, RENORMALIZE=renormalize, **blocks,
            )  # fmt: skip
    return score_TE, expert_TK, gate_TK


def choose_gradient(
    score_TE: Tensor,
    expert_TK: Tensor,
    grad_score_TE: Tensor,
    grad_gate_TK: Tensor,
    score: str,
    renormalize: bool,
    eps: float,
) -> Tensor:
    """See `moedist.moe.kernels.pairs.choose_gradient`."""
    (num_tokens, num_experts), top_k = score_TE.shape, expert_TK.shape[1]
    grad_TE, blocks = torch.empty_like(score_TE), blocks_of_tokens(num_experts, top_k)
    if num_tokens:
        with on(score_TE):
            choose_gradient_kernel[(triton.cdiv(num_tokens, blocks["TOKENS"]),)](
                score_TE, expert_TK, grad_score_TE, grad_gate_TK, grad_TE, num_tokens, num_experts, eps,
                K=top_k, SCORE=score, RENORMALIZE=renormalize, **blocks,
            )  # fmt: skip
    return grad_TE


def places(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> Tensor:
    """See `moedist.moe.kernels.pairs.places`."""
    num_pairs, place_N = bucket_N.shape[0], torch.empty_like(bucket_N)
    if num_pairs == 0:
        return place_N
    buckets = triton.next_power_of_2(num_buckets)
    pairs = max(16, min(128, 8192 // buckets))
    grid = (triton.cdiv(num_pairs, pairs),)
    sizes = torch.empty(grid[0], num_buckets, dtype=torch.int32, device=bucket_N.device)
    given, ordered = bucket_N if order_N is None else order_N, order_N is not None
    with on(bucket_N):
        count_kernel[grid](
            bucket_N, given, sizes, num_pairs, num_buckets, ORDERED=ordered, PAIRS=pairs, BUCKETS=buckets
        )
        first = sizes.cumsum(0, dtype=torch.int32) - sizes
        place_kernel[grid](bucket_N, given, first, place_N, num_pairs, num_buckets, ORDERED=ordered, PAIRS=pairs)
    return place_N
