"""Kernels around experts against their twins: tokens choose, pairs find their places, rows are copied and summed."""

from __future__ import annotations

import itertools
from unittest import mock

import torch

from moedist.moe.context import TokenContext
from moedist.moe.dispatch.rows import sum_pairs, take
from moedist.moe.kernels import device
from moedist.moe.kernels.pairs import Choose
from moedist.moe.plan import place_in_bucket
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import EPS, GroupLimit
from tests.moe.kernels.conftest import by_twins
from tests.ranks import Here

RULES = (
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 3, "renormalize": False},
    {"top_k": 2, "score": "sigmoid", "renormalize": True, "scale": 2.5},
    {"mode": "dense"},
)


def routed(config: TopKConfig, num_experts: int, logits_TE: torch.Tensor) -> list[torch.Tensor]:
    """What a router makes of logits: experts, scores, gates, and the logits' gradient of a loss of all of them."""
    router = config.build(4, num_experts, device=logits_TE.device)
    logits_TE = logits_TE.clone().requires_grad_()
    ctx = TokenContext.of_rows(1, logits_TE.shape[0], device=logits_TE.device)
    with mock.patch.object(type(router), "logits", lambda *_: logits_TE):
        routing = router(logits_TE.new_zeros(logits_TE.shape[0], 4), ctx)
    values = routing.score_TE, routing.probs_TE, routing.gate_N
    weights = (torch.linspace(-1, 1, value.numel()).view(value.shape).to(value) for value in values)
    sum((value * weight).sum() for value, weight in zip(values, weights, strict=True)).backward()
    return [routing.expert_N, *(value.detach() for value in values), logits_TE.grad]


def choices(here: Here, device: str = "cpu") -> None:
    """Few and many experts and tokens, logits full of ties; the same experts to the bit."""
    generator = torch.Generator().manual_seed(0)
    for rules, (num_tokens, num_experts) in itertools.product(RULES, ((0, 4), (3, 5), (40, 8), (70, 3))):
        logits_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator).to(device)
        for drawn_TE in (logits_TE, logits_TE.round()):
            got = routed(TopKConfig(**rules), num_experts, drawn_TE)
            with by_twins():
                expected = routed(TopKConfig(**rules), num_experts, drawn_TE)
            assert torch.equal(got[0], expected[0]), rules
            for value, reference in zip(got[1:], expected[1:], strict=True):
                torch.testing.assert_close(value, reference, atol=1e-14, rtol=0, msg=f"{rules}")
    single = routed(TopKConfig(), 8, logits_TE.new_full((5, 8), torch.nan).float())
    assert single[0].view(5, 2).tolist() == [[0, 1]] * 5, "what is no number must choose experts that there are"


def test_the_same_experts_are_chosen(interpreter):
    interpreter(1).run(choices)


def second_derivatives(here: Here) -> None:
    logits_TE = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for score, renormalize in itertools.product(("softmax", "sigmoid"), (False, True)):

        def call(
            logits_TE: torch.Tensor, rules: tuple[object, ...] = (2, score, renormalize, EPS)
        ) -> tuple[torch.Tensor, torch.Tensor]:
            score_TE, _, gate_TK = Choose.apply(logits_TE, *rules)
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


def test_only_the_best_logits_are_chosen_in_a_kernel(interpreter):
    assert interpreter(1).run(kernels_of) == [[True, False, False, False, False]]
    assert kernels_of(Here(0, 1)) == [False] * 5


def moved(here: Here, device: str = "cpu") -> None:
    """Places and rows, with numbers that fill no block, and none at all."""
    generator = torch.Generator().manual_seed(0)

    def drawn(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    def results() -> list[torch.Tensor]:
        generator.manual_seed(1)
        made = []
        for num_pairs, num_buckets in ((0, 3), (1, 1), (50, 5), (300, 33)):
            bucket_N, order_N = drawn(num_buckets, num_pairs), torch.randperm(num_pairs, generator=generator)
            order_N = order_N.to(device)
            made += [place_in_bucket(bucket_N, num_buckets, order) for order in (None, order_N)]
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
    with mock.patch.object(pairs_kernels, "places", lambda bucket_N, *_: torch.zeros_like(bucket_N)):
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
