"""Top-k token choice: values, ties, types, and what noise may touch."""

from __future__ import annotations

import math

import pytest
import torch

from moedist.config import ConfigError
from moedist.moe.context import TokenContext
from moedist.moe.init import named_draw
from moedist.moe.router.topk import TopKConfig
from tests.moe.by_hand import route_logits

LOGITS = [2.1, -0.5, 1.3, 0.8]


def context(num_tokens: int, **kwargs: object) -> TokenContext:
    return TokenContext.of_rows(1, num_tokens, **kwargs)


def test_softmax_and_renormalised_top_2():
    routing = route_logits(torch.tensor([LOGITS], dtype=torch.float64), context(1), top_k=2)
    torch.testing.assert_close(
        routing.probs_TE, torch.tensor([[0.5568, 0.0414, 0.2502, 0.1517]]).double(), atol=5e-5, rtol=0
    )
    assert routing.expert_N.tolist() == [0, 2]
    torch.testing.assert_close(routing.gate_N, torch.tensor([0.6900, 0.3100]).double(), atol=5e-5, rtol=0)
    assert torch.equal(routing.score_TE, routing.probs_TE)


@pytest.mark.requirement("R0-25")
def test_pairs_stand_in_token_order_with_falling_preference():
    routing = route_logits(torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]]), context(2), top_k=3)
    assert routing.token_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert routing.expert_N.tolist() == [1, 2, 0, 0, 2, 1]
    assert routing.pairs_per_token == 3


@pytest.mark.requirement("R0-27")
@pytest.mark.pitfall("24")
@pytest.mark.parametrize(
    ("logits", "top_k", "chosen"),
    [
        ([1.0] * 4, 2, [0, 1]),
        ([1.0] * 64, 3, [0, 1, 2]),
        ([0.0, 5.0, 5.0, 5.0], 2, [1, 2]),
        ([5.0, 0.0, 5.0, -1e30, 5.0], 4, [0, 2, 4, 1]),
        ([200.0, 201.0, 0.0], 1, [1]),
    ],
)
def test_equal_scores_go_to_the_lowest_index(logits, top_k, chosen):
    """Pitfall 24."""
    routing = route_logits(torch.tensor([logits] * 5), context(5), top_k=top_k)
    assert routing.expert_N.view(5, top_k).tolist() == [chosen] * 5


@pytest.mark.requirement("R0-24")
@pytest.mark.pitfall("28")
def test_scores_are_fp32_under_autocast_and_with_bf16_weights():
    """Pitfall 28: equal to the bit to the router that never heard of bf16."""
    x_TD = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    router = TopKConfig().build(16, 4)
    router.init_weights(named_draw(0))
    plain = router(x_TD, context(6))
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x_TD, context(6))
    assert cast.logits_TE.dtype == cast.probs_TE.dtype == cast.gate_N.dtype == torch.float32
    assert torch.equal(cast.logits_TE, plain.logits_TE)
    router.bfloat16()
    assert router(x_TD.bfloat16(), context(6)).logits_TE.dtype == torch.float32


@pytest.mark.requirement("D2")
@pytest.mark.pitfall("27")
def test_noise_leaves_inputs_logits_and_evaluation_alone():
    """Pitfall 27."""
    router = TopKConfig(top_k=2, noise_std=3.0).build(8, 4)
    router.init_weights(named_draw(0))
    x_TD = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    before, state = x_TD.clone(), torch.get_rng_state()
    noisy, quiet = router(x_TD, context(32)), router(x_TD, context(32, training=False))
    assert torch.equal(x_TD, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noisy.logits_TE, quiet.logits_TE), "the z-loss sees un-noised logits"
    assert not torch.equal(noisy.expert_N, quiet.expert_N)
    again = router(x_TD, context(32, training=False, step=9))
    assert torch.equal(again.expert_N, quiet.expert_N) and torch.equal(again.gate_N, quiet.gate_N)


def test_noise_has_its_standard_deviation():
    routing = route_logits(torch.zeros(5000, 8), context(5000), top_k=2, noise_std=0.5)
    log_probs_TE = routing.probs_TE.log()
    noise_TE = log_probs_TE - log_probs_TE.mean(1, keepdim=True)
    assert noise_TE.std().item() == pytest.approx(0.5 * math.sqrt(7 / 8), rel=0.02)


@pytest.mark.requirement("R0-26", "R3-04")
@pytest.mark.parametrize(("top_k", "renormalize", "sums_to_1"), [(1, None, False), (2, None, True), (2, False, False)])
def test_renormalize(top_k, renormalize, sums_to_1):
    routing = route_logits(torch.tensor([LOGITS]), context(1), top_k=top_k, renormalize=renormalize)
    expected = 1.0 if sums_to_1 else sum(sorted(torch.tensor(LOGITS).softmax(0).tolist())[-top_k:])
    assert routing.gate_N.sum().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.requirement("C4")
def test_one_expert_per_token_keeps_a_task_gradient_unless_renormalised():
    for renormalize, alive in ((None, True), (True, False)):
        logits = torch.tensor([LOGITS], requires_grad=True)
        if renormalize:
            with pytest.warns(UserWarning, match="top_k = 1 makes every gate the constant 1"):
                routing = route_logits(logits, context(1), top_k=1, renormalize=True)
        else:
            routing = route_logits(logits, context(1), top_k=1)
        routing.gate_N.sum().backward()
        assert (logits.grad.abs().max() > 1e-3) == alive


def test_no_tokens():
    routing = route_logits(torch.zeros(0, 4), context(0), top_k=2)
    assert routing.expert_N.shape == (0,) and routing.probs_TE.shape == (0, 4)


@pytest.mark.requirement("R0-23", "C22")
def test_first_values_have_xavier_spread_and_follow_the_seed():
    router = TopKConfig().build(400, 100)
    router.init_weights(named_draw(1, "layer"))
    assert router.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    first = router.weight.detach().clone()
    router.init_weights(named_draw(1, "layer"))
    assert torch.equal(first, router.weight)
    router.init_weights(named_draw(2, "layer"))
    assert not torch.equal(first, router.weight)


@pytest.mark.requirement("R0-05", "R2-14")
@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"top_k": -1}, "top_k", "Set it to 1 or more"),
        ({"noise_std": -0.1}, "noise_std", "Set it to 0"),
        ({"top_k": 9}, "top_k", "Set moe.router.top_k to 8 or less"),
    ],
)
def test_errors(config, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        TopKConfig(**config).build(4, 8)
    assert caught.value.key == key and caught.value.value == config[key]


@pytest.mark.requirement("R0-07", "R0-32")
def test_R0_20_noise_where_its_deviation_is_above_0():
    """Any deviation above 0 changes what is routed, 0 changes nothing; weights sum to 1 and experts are in range."""
    logits_TE, ctx = torch.zeros(50, 8, dtype=torch.float64), context(50)
    quiet = route_logits(logits_TE, ctx, top_k=2)
    for noise_std, other in ((0.0, False), (1e-6, True), (1.0, True)):
        routing = route_logits(logits_TE, ctx, top_k=2, noise_std=noise_std)
        assert (not torch.equal(routing.expert_N, quiet.expert_N)) == other
        assert torch.equal(routing.probs_TE, quiet.probs_TE) != other
        torch.testing.assert_close(routing.gate_N.view(50, 2).sum(1), torch.ones(50).double(), atol=1e-12, rtol=0)
        assert routing.expert_N.min() >= 0 and routing.expert_N.max() < 8


def test_R0_24_probabilities_of_large_logits():
    logits_TE = 1e4 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    probs_TE = route_logits(logits_TE, context(40), top_k=2).probs_TE
    assert probs_TE.isfinite().all() and (probs_TE >= 0).all()
    torch.testing.assert_close(probs_TE.sum(1), torch.ones(40), atol=1e-6, rtol=0)
    assert torch.equal(probs_TE.argmax(1), logits_TE.argmax(1))


@pytest.mark.requirement("R2-15")
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_C3_softmax_before_or_after_the_choice(top_k):
    logits_TE = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = route_logits(logits_TE, context(30), top_k=top_k, renormalize=top_k > 1 or None)
    chosen_TK, expert_TK = logits_TE.topk(top_k)
    assert torch.equal(routing.expert_N.view(30, top_k), expert_TK)
    expected_TK = chosen_TK.softmax(1) if top_k > 1 else logits_TE.softmax(1).gather(1, expert_TK)
    torch.testing.assert_close(routing.gate_N.view(30, top_k), expected_TK, atol=1e-14, rtol=0)
    torch.testing.assert_close(routing.probs_TE, logits_TE.softmax(1), atol=0, rtol=0)


def test_R3_01_a_width_is_1_or_more():
    for dim in (0, -3):
        with pytest.raises(ValueError, match=f"dim = {dim} is no width of vectors. Set it to 1 or more"):
            TopKConfig().build(dim, 8)


def test_R3_02_one_map_without_bias():
    config = TopKConfig(top_k=3)
    router = config.build(6, 8)
    assert router.config == config and router.weight.shape == (8, 6) and router.bias is None
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert TopKConfig(bias=True).build(6, 8).bias.shape == (8,)


@pytest.mark.requirement("R3-04", "R3-05")
def test_R3_03_scores_and_experts_of_every_token():
    x_BSD = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    router = TopKConfig(top_k=3).build(6, 8)
    router.init_weights(named_draw(0))
    routing = router(x_BSD.flatten(0, 1), TokenContext.of_rows(2, 5))
    score_BSK, expert_BSK = routing.gate_N.view(2, 5, 3), routing.expert_N.view(2, 5, 3)
    torch.testing.assert_close(score_BSK.sum(2), torch.ones(2, 5), atol=1e-6, rtol=0)
    assert expert_BSK.dtype == torch.int64 and expert_BSK.min() >= 0 and expert_BSK.max() < 8
