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
def best_of(value_TE, is_open, e, EXPERTS: tl.constexpr):
    """Each token's highest value among those that are open, and where it stands: the lowest place where several do."""
    best = tl.max(tl.where(is_open, value_TE, -float("inf")), 1)
    wins = is_open & (value_TE == best[:, None])
    return best, tl.min(tl.where(wins, e[None, :], EXPERTS), 1)


@triton.jit
def choose_kernel(
    logits, selection_bias, score, expert, gate, allowed, num_tokens, num_experts, eps,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, GROUP_PLACES: tl.constexpr,
):  # fmt: skip
    """Scores of all experts; the K experts of the highest logits, with a bias of the highest biased scores (equal ones:
    the lowest index), of the best groups alone where there are groups; and their gates."""
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
    order_TE = logits_TE
    value_TE = score_TE
    if BIASED:
        bias_E = tl.load(selection_bias + e, mask=e < num_experts, other=0).to(score_TE.dtype)
        value_TE = score_TE + bias_E[None, :]
        order_TE = value_TE
    # As in a sort, what is no number comes first: every token gets K experts, whatever its logits are.
    order_TE = tl.where(order_TE == order_TE, order_TE, float("inf"))
    is_open = (e < num_experts)[None, :] & (t >= 0)[:, None]
    if GROUPS > 0:
        value_TE = tl.where(value_TE == value_TE, value_TE, float("inf"))
        own = e // (num_experts // GROUPS)
        g = tl.arange(0, GROUP_PLACES)
        worth_TG = tl.zeros((TOKENS, GROUP_PLACES), dtype=score_TE.dtype)
        for group in tl.static_range(GROUPS):
            inside = is_open & (own == group)[None, :]
            worth, at = best_of(value_TE, inside, e, EXPERTS)
            if SUM_OF_TWO:
                second, at = best_of(value_TE, inside & (e[None, :] != at[:, None]), e, EXPERTS)
                worth += second
            worth_TG = tl.where((g == group)[None, :], worth[:, None], worth_TG)
        group_is_open = (g < GROUPS)[None, :] & (t >= 0)[:, None]
        is_allowed = (own < 0)[None, :] & is_open
        for _rank in tl.static_range(TOP_GROUPS):
            best, chosen = best_of(worth_TG, group_is_open, g, GROUP_PLACES)
            group_is_open = group_is_open & (g[None, :] != chosen[:, None])
            is_allowed = is_allowed | (own[None, :] == chosen[:, None])
        is_open = is_open & is_allowed
        tl.store(allowed + place, is_allowed, mask=is_there)
    expert_TK = tl.zeros((TOKENS, CHOICES), dtype=tl.int32)
    score_TK = tl.zeros((TOKENS, CHOICES), dtype=score_TE.dtype)
    for choice in tl.static_range(K):
        best, chosen = best_of(order_TE, is_open, e, EXPERTS)
        is_chosen = e[None, :] == chosen[:, None]
        is_open = is_open & (e[None, :] != chosen[:, None])
        expert_TK = tl.where((k == choice)[None, :], chosen[:, None], expert_TK)
        own_score = tl.sum(tl.where(is_chosen, score_TE, 0), 1)
        score_TK = tl.where((k == choice)[None, :], own_score[:, None], score_TK)
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
    bucket, order, sizes, num_pairs, num_buckets, num_tiles,
    ORDERED: tl.constexpr, PAIRS: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """How many of each program's pairs are of each bucket."""
    b = tl.arange(0, BUCKETS)
    size = tl.zeros((BUCKETS,), dtype=tl.int32)
    for tile in range(0, num_tiles):
        i = (tl.program_id(0) * num_tiles + tile) * PAIRS + tl.arange(0, PAIRS)
        pair = tl.load(order + i, mask=i < num_pairs, other=0) if ORDERED else i
        own = tl.load(bucket + pair, mask=i < num_pairs, other=-1)
        size += tl.sum((own[:, None] == b[None, :]).to(tl.int32), 0)
    tl.store(sizes + tl.program_id(0) * num_buckets + b, size, mask=b < num_buckets)


@triton.jit
def place_kernel(
    bucket, order, sizes, place, size_B, num_pairs, num_buckets, num_tiles,
    ORDERED: tl.constexpr, PAIRS: tl.constexpr, BUCKETS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Each pair's place: those of its bucket that other programs counted before, and before it in its own. The last
    program has then counted all."""
    b = tl.arange(0, BUCKETS)
    before = tl.zeros((BUCKETS,), dtype=tl.int32)
    for first in range(0, tl.program_id(0), PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        counted = (program < tl.program_id(0))[:, None] & (b < num_buckets)[None, :]
        before += tl.sum(tl.load(sizes + program[:, None] * num_buckets + b[None, :], mask=counted, other=0), 0)
    for tile in range(0, num_tiles):
        begin = (tl.program_id(0) * num_tiles + tile) * PAIRS
        i = begin + tl.arange(0, PAIRS)
        pair = tl.load(order + i, mask=i < num_pairs, other=0) if ORDERED else i
        own = tl.load(bucket + pair, mask=i < num_pairs, other=-1)
        j = begin + tl.arange(0, PAIRS)
        other = tl.load(order + j, mask=j < num_pairs, other=0) if ORDERED else j
        of_other = tl.load(bucket + other, mask=j < num_pairs, other=-1)
        is_own = own[:, None] == b[None, :]
        at = tl.sum(tl.where(is_own, before[None, :], 0), 1)
        at += tl.sum(((own[:, None] == of_other[None, :]) & (j[None, :] < i[:, None])).to(tl.int32), 1)
        tl.store(place + pair, tl.where(own >= 0, at, -1).to(tl.int64), mask=i < num_pairs)
        before += tl.sum(is_own.to(tl.int32), 0)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(size_B + b, before.to(tl.int64), mask=b < num_buckets)


def probe(device: torch.device) -> bool:
    """Whether small cases come out as they must on a device: ties, rows that are not there, buckets by turns."""
    x = torch.arange(40, device=device, dtype=torch.float32).view(5, 8)
    summed = sum_rows(x, torch.tensor([[4, -1], [0, 2], [-1, -1]], device=device))
    bucket_N = torch.tensor([2, 0, 2, -1, 0, 2], device=device)
    filled = fill_buckets(bucket_N, 3, None), fill_buckets(bucket_N, 3, torch.arange(5, -1, -1, device=device))
    logits_TE = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]], device=device, requires_grad=True)
    weight_TE = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]], device=device)
    probs_TE = logits_TE.softmax(1)
    first_two = torch.tensor([[1, 2], [0, 1]], device=device)
    (probs_TE * weight_TE).sum().backward()
    score_TE, expert_TK, gate_TK, _ = choose(logits_TE.detach(), None, 2, "softmax", False, 0.0, 0, 0, False)
    grad_TE = choose_gradient(score_TE, expert_TK, weight_TE, torch.zeros_like(gate_TK), "softmax", False, 0.0)
    assert logits_TE.grad is not None
    return (
        torch.equal(summed, torch.stack([x[4], x[0] + x[2], torch.zeros_like(x[0])]))
        and [[part.tolist() for part in each] for each in filled]
        == [[[0, 0, 1, -1, 1, 2], [2, 0, 3]], [[2, 1, 1, -1, 0, 0], [2, 0, 3]]]
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


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    eps: float,
    num_groups: int,
    top_groups: int,
    sum_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `moedist.moe.kernels.pairs.choose`."""
    num_tokens, num_experts = logits_TE.shape
    blocks = blocks_of_tokens(num_experts, top_k)
    score_TE = torch.empty_like(logits_TE)
    expert_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    gate_TK = logits_TE.new_empty(num_tokens, top_k)
    allowed_TE = logits_TE.new_empty(num_tokens, num_experts if num_groups else 0, dtype=torch.bool)
    if num_tokens:
        with on(logits_TE):
            choose_kernel[(triton.cdiv(num_tokens, blocks["TOKENS"]),)](
                logits_TE, bias_E, score_TE, expert_TK, gate_TK, allowed_TE, num_tokens, num_experts, eps,
                K=top_k, SCORE=score, RENORMALIZE=renormalize, BIASED=bias_E is not None,
                GROUPS=num_groups, TOP_GROUPS=top_groups, SUM_OF_TWO=sum_of_two, **blocks,
                GROUP_PLACES=triton.next_power_of_2(max(num_groups, 1)),
            )  # fmt: skip
    return score_TE, expert_TK, gate_TK, allowed_TE


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


MOST_PROGRAMS = 128
"""That place pairs: about as many as a large GPU has processors, and few enough that each reads all counts before its
own."""


def fill_buckets(bucket_N: Tensor, num_buckets: int, order_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `moedist.moe.kernels.pairs.fill_buckets`."""
    num_pairs, place_N = bucket_N.shape[0], torch.empty_like(bucket_N)
    if num_pairs == 0:
        return place_N, bucket_N.new_zeros(num_buckets)
    size_B = bucket_N.new_empty(num_buckets)
    buckets = triton.next_power_of_2(max(num_buckets, 1))
    pairs = max(16, min(128, 8192 // buckets))
    num_tiles = triton.cdiv(num_pairs, pairs * MOST_PROGRAMS)
    grid = (triton.cdiv(num_pairs, pairs * num_tiles),)
    sizes = torch.empty(grid[0], num_buckets, dtype=torch.int32, device=bucket_N.device)
    given, shape = bucket_N if order_N is None else order_N, (num_pairs, num_buckets, num_tiles)
    blocks = {"ORDERED": order_N is not None, "PAIRS": pairs, "BUCKETS": buckets}
    with on(bucket_N):
        count_kernel[grid](bucket_N, given, sizes, *shape, **blocks)
        place_kernel[grid](
            bucket_N, given, sizes, place_N, size_B, *shape, **blocks, PROGRAMS=max(1, min(32, 4096 // buckets))
        )
    return place_N, size_B
