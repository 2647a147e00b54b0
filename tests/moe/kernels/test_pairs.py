"""Kernels around experts against their twins: tokens choose, pairs find their places, rows are copied and summed."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch

from moedist.moe.context import TokenContext
from moedist.moe.dispatch.rows import sum_pairs, take
from moedist.moe.kernels import device
from moedist.moe.kernels.pairs import ChoiceRules, Choose
from moedist.moe.plan import fill_buckets
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import EPS, GroupLimit, best_experts, best_groups
from tests.moe.kernels.conftest import by_twins
from tests.ranks import Here

RULES = (
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 3, "renormalize": False},
    {"top_k": 2, "score": "sigmoid", "renormalize": True, "scale": 2.5},
    {"mode": "dense"},
)
GROUPED = (
    {"top_k": 4, "groups": GroupLimit(num_groups=4, top_groups=2), "score": "sigmoid"},
    {"top_k": 3, "groups": GroupLimit(num_groups=3, top_groups=1, score="max")},
    {"top_k": 8, "groups": GroupLimit(num_groups=2, top_groups=2)},
)


def routed(config: TopKConfig, logits_TE: torch.Tensor, bias_E: torch.Tensor | None) -> list[torch.Tensor]:
    """What a router makes of logits: experts, scores, gates, and the logits' gradient of a loss of all of them."""
    router = config.build(4, logits_TE.shape[1], device=logits_TE.device)
    if bias_E is not None:
        router.add_selection_bias()
        router.selection_bias.copy_(bias_E)
    logits_TE = logits_TE.clone().requires_grad_()
    ctx = TokenContext.of_rows(1, logits_TE.shape[0], device=logits_TE.device)
    with mock.patch.object(type(router), "logits", lambda *_: logits_TE):
        routing = router(logits_TE.new_zeros(logits_TE.shape[0], 4), ctx)
    values = routing.score_TE, routing.probs_TE, routing.gate_N
    weights = (torch.linspace(-1, 1, value.numel()).view(value.shape).to(value) for value in values)
    sum((value * weight).sum() for value, weight in zip(values, weights, strict=True)).backward()
    allowed_TE = torch.empty(0) if routing.allowed_TE is None else routing.allowed_TE
    return [routing.expert_N, allowed_TE, *(value.detach() for value in values), logits_TE.grad]


def same_choices(rules: dict[str, Any], logits_TE: torch.Tensor, bias_E: torch.Tensor | None) -> None:
    """The same experts to the bit."""
    got = routed(TopKConfig(**rules), logits_TE, bias_E)
    with by_twins():
        expected = routed(TopKConfig(**rules), logits_TE, bias_E)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), (rules, bias_E)
    for value, reference in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(value, reference, atol=1e-14, rtol=0, msg=f"{rules}")


def choices(here: Here, device: str = "cpu", few: bool = False) -> None:
    """Few and many experts and tokens, logits and biases full of ties."""
    generator = torch.Generator().manual_seed(0)
    plain = itertools.product(RULES, ((0, 4), (3, 5), (40, 8), (70, 3)))
    grouped = itertools.product(GROUPED, ((0, 12), (33, 12)))
    for turn, (rules, (num_tokens, num_experts)) in enumerate(itertools.chain(plain, grouped)):
        logits_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator).to(device)
        bias_E = torch.randn(num_experts, generator=generator).to(device)
        cases = list(itertools.product((logits_TE, logits_TE.round()), (None, bias_E, bias_E.round())))
        for drawn_TE, bias in cases[turn % 6 :: 6] if few else cases:
            same_choices(rules, drawn_TE, bias)
    single = routed(TopKConfig(), logits_TE.new_full((5, 8), torch.nan).float(), None)
    assert single[0].view(5, 2).tolist() == [[0, 1]] * 5, "what is no number must choose experts that there are"


def choices_by_score(here: Here, device: str = "cpu") -> None:
    """In fp32, where two devices round scores differently: chosen are the best of the scores that come with them."""
    generator = torch.Generator().manual_seed(1)
    groups = GroupLimit(num_groups=8, top_groups=3)
    for top_k, num_experts in ((1, 7), (8, 96), (6, 256)):
        logits_TE = (8 * torch.randn(9, num_experts, generator=generator)).to(device)
        bias_E = (0.01 * torch.randn(num_experts, generator=generator).round(decimals=1)).to(device)
        for score, limit in itertools.product(("softmax", "sigmoid"), (None, groups) if num_experts > 7 else (None,)):
            config = TopKConfig(top_k=top_k, score=score, groups=limit)
            expert_N, allowed_TE, score_TE, *_ = routed(config, logits_TE, bias_E)
            order_TE = score_TE + bias_E
            if limit is not None:
                assert torch.equal(allowed_TE, best_groups(order_TE, limit))
                order_TE = order_TE.masked_fill(~allowed_TE, -torch.inf)
            assert torch.equal(expert_N.view(-1, top_k), best_experts(order_TE, top_k))


def test_the_same_experts_are_chosen(interpreter):
    interpreter(1).run(choices, few=True)


@pytest.mark.slow
def test_the_same_experts_are_chosen_in_all_cases(interpreter):
    interpreter(1).run(choices, limit_s=300)


def test_the_best_scores_are_chosen(interpreter):
    interpreter(1).run(choices_by_score)


def second_derivatives(here: Here) -> None:
    logits_TE = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for score, renormalize in itertools.product(("softmax", "sigmoid"), (False, True)):
        rules = ChoiceRules(2, score, renormalize, EPS)

        def call(logits_TE: torch.Tensor, rules: ChoiceRules = rules) -> tuple[torch.Tensor, torch.Tensor]:
            score_TE, _, gate_TK, _ = Choose.apply(logits_TE, None, rules)
            return score_TE, gate_TK

        assert torch.autograd.gradcheck(call, (logits_TE,)) and torch.autograd.gradgradcheck(call, (logits_TE,))


def test_a_choice_has_second_derivatives(interpreter):
    interpreter(1).run(second_derivatives)


def kernels_of(here: Here) -> list[bool]:
    """Which routers choose in the kernel."""
    plain, forced = TopKConfig().build(4, 8), ForcedConfig(pattern="zipf").build(4, 8)
    grouped, biased = TopKConfig(groups=GroupLimit(num_groups=4, top_groups=2)).build(4, 8), TopKConfig().build(4, 8)
    biased.add_selection_bias()
    curved = TopKConfig(score="sqrt_softplus").build(4, 8)
    return [router.chooses_in_kernel(torch.zeros(1, 8)) for router in (plain, forced, grouped, biased, curved)]


def test_whose_choice_is_a_kernel(interpreter):
    assert interpreter(1).run(kernels_of) == [[True, False, True, True, False]]
    assert kernels_of(Here(0, 1)) == [False] * 5


def moved(here: Here, device: str = "cpu") -> None:
    """Places and rows, with numbers that fill no block, and none at all."""
    generator = torch.Generator().manual_seed(0)

    def drawn(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    def results() -> list[torch.Tensor]:
        generator.manual_seed(1)
        made = []
        for num_pairs, num_buckets in ((0, 3), (1, 1), (50, 5), (300, 33), (2200, 800)):
            bucket_N = drawn(num_buckets, num_pairs, low=-1)
            order_N = torch.randperm(num_pairs, generator=generator).to(device)
            for order in (None, order_N):
                made += fill_buckets(bucket_N, num_buckets, order)
        for dtype, width in itertools.product((torch.float64, torch.float32, torch.bfloat16), (1, 37, 1100)):
            x = torch.randn(9, width, generator=generator).to(device, dtype)
            made.append(take(x, drawn(9, 20, low=-1)))
            for top_k in (1, 2, 5):
                row_N = drawn(9, 7 * top_k, low=-1)
                made.append(sum_pairs(x, row_N, None, top_k, 7))
        return made

    got = results()
    with by_twins():
        expected = results()
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == reference.dtype
        tolerance = {torch.float64: 1e-15, torch.float32: 1e-6}.get(value.dtype, 0)
        torch.testing.assert_close(value, reference, atol=tolerance, rtol=8e-3 if value.dtype == torch.bfloat16 else 0)


def test_pairs_find_the_same_places_and_rows(interpreter):
    interpreter(1).run(moved)


def probes(here: Here) -> list[bool]:
    from moedist.moe.kernels import ffn_kernels, pairs_kernels

    right = [kernels.probe(torch.device("cpu")) for kernels in (ffn_kernels, pairs_kernels)]
    with mock.patch.object(pairs_kernels, "fill_buckets", lambda bucket_N, *_: (bucket_N, bucket_N)):
        return [*right, pairs_kernels.probe(torch.device("cpu"))]


def test_a_probe_sees_a_wrong_kernel(interpreter):
    assert interpreter(1).run(probes) == [[True, True, False]]


def test_a_gpu_without_triton_or_a_compiler_says_so(monkeypatch):
    gpu = torch.device("cuda", 0)
    device._why_not.cache_clear()
    with mock.patch.object(torch.cuda, "get_device_name", lambda _: "a GPU"):
        monkeypatch.setenv("MOEDIST_TRITON", "0")
        assert device.why_not(gpu, "pairs") == "MOEDIST_TRITON is 0"
        monkeypatch.delenv("MOEDIST_TRITON")
        device._why_not.cache_clear()
        with mock.patch("importlib.util.find_spec", lambda _: None):
            assert device.why_not(gpu, "pairs") == "Triton is not installed"
        device._why_not.cache_clear()
        broken = mock.Mock(probe=mock.Mock(side_effect=RuntimeError("Failed to find C compiler.\nSet CC.")))
        with mock.patch("importlib.util.find_spec"), mock.patch("importlib.import_module", lambda _: broken):
            reason = "Triton cannot run on a GPU (RuntimeError: Failed to find C compiler.)"
            assert device.why_not(gpu, "ffn") == reason
            assert device.pairs_note(gpu) == f"pairs are chosen, placed, copied and summed by torch: {reason}"
    device._why_not.cache_clear()
    assert device.pairs_note(torch.device("cpu")) is None
